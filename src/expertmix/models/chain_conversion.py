"""A pretrained MoE becomes a Chain-of-Experts that computes the same, and back.

The first iteration is the MoE's layer. Each added one starts with the first one's norm and router,
and with a scale of zero, so the chain's logits are the MoE's (arXiv 2506.18945 trains from scratch;
this start is ours). The router is a copy, without noise: it asks a trained question of a state
that the experts have already moved, so the scale's first gradient comes from a choice that makes
sense, and nothing has to be broken apart, since iterations stand in series and each reads another
state as soon as a scale leaves zero.

Knows checkpoints and names; runs no model. Holds one tensor at a time, at most one projection of
all experts of a layer.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig

from expertmix.core.progress import Progress, quiet
from expertmix.errors import CheckpointError, UnsupportedModelError
from expertmix.models.chain_families import chain_config, check_unchanged
from expertmix.models.chain_layout import Layout, Part, is_scale, iteration_of
from expertmix.models.checkpoint import Checkpoint
from expertmix.models.coe import CoeConfig, CoeForCausalLM
from expertmix.models.folders import building, check_free
from expertmix.models.shards import Shape, Spec, write_tensors

_HEAD = "lm_head.weight"


@dataclass(frozen=True, eq=False)
class Conversion:
    """A conversion whose input has been checked; nothing is written.

    Attributes:
        checkpoint: What is converted.
        family: Model type of the MoE.
        chain: Settings of the CoE that is made, or taken apart.
        settings: What config.json will hold.
        specs: What will be written, in order.
        produce: Makes a tensor just before it is written.
    """

    checkpoint: Checkpoint
    family: str
    chain: CoeConfig
    settings: dict[str, Any]
    specs: dict[str, Spec]
    produce: Callable[[str], Tensor]

    @property
    def size(self) -> int:
        """Bytes of the weights to be written."""
        return sum(spec.size for spec in self.specs.values())

    def write(
        self, out: Path, *, max_shard_bytes: int = 5_000_000_000, progress: Progress = quiet
    ) -> Path:
        """Writes weights, config, tokenizer and generation settings; all of it, or nothing.

        Args:
            out: Folder that does not exist yet, or is empty.
            max_shard_bytes: Size of a weights file.
            progress: Told the number of tensors written.

        Raises:
            OutputError: `out` is in the way or cannot be written.
        """
        check_free(out)
        with building(out) as folder:
            written = write_tensors(folder, self.specs, self.produce, max_shard_bytes)
            for done, _ in enumerate(written, 1):
                progress("writing tensors", done, len(self.specs))
            self.checkpoint.copy_companions(folder)
            (folder / "config.json").write_text(json.dumps(self.settings, indent=2) + "\n")
        return out


def to_chain(model: str | Path, iterations: int = 2) -> Conversion:
    """How a MoE becomes a chain with the same logits.

    Args:
        model: Folder or hub id of an OLMoE, Mixtral, Qwen2-MoE, Qwen3-MoE or DeepSeek-V2.
        iterations: C. With 1, the chain is the MoE and no more.

    Raises:
        ConfigError: Fewer than one iteration.
        CheckpointError: Files or tensors missing, broken or pickled.
        UnsupportedModelError: A chain does not compute what this model computes.

    Example:
        >>> to_chain("allenai/OLMoE-1B-7B-0924", iterations=2).write(Path("olmoe-coe"))
    """
    checkpoint = Checkpoint.open(model)
    source = checkpoint.config()
    chain = chain_config(checkpoint.name, source, iterations)
    stored, layout = checkpoint.specs(), _layout(checkpoint)
    shapes = _shapes(chain, head=_HEAD in stored)
    parts = {name: layout.parts(name, shape) for name, shape in shapes.items()}
    _check_names(checkpoint, {part.name for of in parts.values() for part in of})
    specs = {name: _spec(checkpoint, stored, shapes[name], of) for name, of in parts.items()}

    def produce(name: str) -> Tensor:
        return _assembled(checkpoint, parts[name], specs[name])

    origin = {"name": checkpoint.name, "layout": layout.to_json(), "config": checkpoint.settings()}
    settings = json.loads(chain.to_json_string()) | {"converted_from": origin}
    return Conversion(checkpoint, source.model_type, chain, settings, specs, produce)


def to_moe(model: str | Path, *, first_iteration_only: bool = False) -> Conversion:
    """How a chain that was made of a MoE becomes that MoE again, tensor for tensor.

    Args:
        model: Folder or hub id of the CoE.
        first_iteration_only: Drop added iterations also where they compute something.

    Raises:
        CheckpointError: Files or tensors missing, broken or pickled.
        UnsupportedModelError: Not a CoE, not made of a MoE, changed since, or with added iterations
            that compute something.
    """
    checkpoint = Checkpoint.open(model)
    chain = checkpoint.config()
    if not isinstance(chain, CoeConfig):
        raise UnsupportedModelError(
            f"{checkpoint.name} is a {chain.model_type}, not a CoE: only a CoE goes back to a MoE"
        )
    settings, layout = _origin(checkpoint.name, chain)
    check_unchanged(checkpoint.name, chain, _config(checkpoint.name, settings))
    stored = checkpoint.specs()
    shapes = _shapes(chain, head=_HEAD in stored)
    _check_names(checkpoint, set(shapes))
    for name, shape in shapes.items():
        _check_shape(checkpoint, stored, name, shape)
    if not first_iteration_only:
        _check_scales(checkpoint, shapes)
    origins = _origins(layout, shapes)
    specs = {
        name: Spec(part.shape(shapes[whole]), stored[whole].dtype)
        for name, (whole, part) in origins.items()
    }

    def produce(name: str) -> Tensor:
        whole, part = origins[name]
        return checkpoint.part(whole, *part.places()).reshape(specs[name].shape)

    settings = _with_dtype(settings, chain)
    return Conversion(checkpoint, settings["model_type"], chain, settings, specs, produce)


def _origins(layout: Layout, shapes: dict[str, Shape]) -> dict[str, tuple[str, Part]]:
    """MoE's tensor -> the chain's that it is part of; added iterations are part of none."""
    return {
        part.name: (name, part)
        for name, shape in shapes.items()
        if iteration_of(name) == 0
        for part in layout.parts(name, shape)
    }


def _layout(checkpoint: Checkpoint) -> Layout:
    try:
        return Layout.of(checkpoint.files)
    except CheckpointError as problem:
        raise CheckpointError(f"{checkpoint.name}: {problem}") from None


def _shapes(chain: CoeConfig, *, head: bool) -> dict[str, Shape]:
    """Every tensor of the chain on disk, in the order of writing."""
    with torch.device("meta"):
        model = CoeForCausalLM(chain)
    tied = bool(chain.tie_word_embeddings) and not head
    return {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if not (tied and name == _HEAD)
    }


def _check_names(checkpoint: Checkpoint, needed: set[str]) -> None:
    if missing := sorted(needed - set(checkpoint.files)):
        raise CheckpointError(
            f"{checkpoint.name} lacks {len(missing)} tensors that its config.json asks for, such "
            f"as {missing[0]}"
        )
    for name in sorted(set(checkpoint.files) - needed):
        if not name.endswith("rotary_emb.inv_freq"):  # computed, where old checkpoints store it
            raise UnsupportedModelError(
                f"cannot convert {checkpoint.name}: there is no place for its tensor {name!r}"
            )


def _check_shape(checkpoint: Checkpoint, stored: dict[str, Spec], name: str, shape: Shape) -> None:
    if stored[name].shape != shape:
        raise CheckpointError(
            f"{checkpoint.name}: {name} is {stored[name].shape}, but its config.json asks for "
            f"{shape}. Use weights and config of the same model"
        )


def _spec(checkpoint: Checkpoint, stored: dict[str, Spec], shape: Shape, parts: list[Part]) -> Spec:
    """Of the type of its parts; a scale, which has none, of that of the last norm."""
    for part in parts:
        _check_shape(checkpoint, stored, part.name, part.shape(shape))
    types = {stored[part.name].dtype for part in parts} or {stored["model.norm.weight"].dtype}
    if len(types) > 1:
        raise CheckpointError(
            f"{checkpoint.name}: {parts[0].name} and its neighbors are of several types: "
            f"{', '.join(sorted(map(str, types)))}"
        )
    return Spec(shape, types.pop())


def _assembled(checkpoint: Checkpoint, parts: list[Part], spec: Spec) -> Tensor:
    if not parts:
        return torch.zeros(spec.shape, dtype=spec.dtype)
    if parts[0].expert is None:
        return checkpoint.tensor(parts[0].name)
    whole = torch.empty(spec.shape, dtype=spec.dtype)
    for part in parts:
        whole[part.places()] = checkpoint.tensor(part.name)
    return whole


def _origin(name: str, chain: CoeConfig) -> tuple[dict[str, Any], Layout]:
    origin: Any = getattr(chain, "converted_from", None)
    if origin is None:
        raise UnsupportedModelError(
            f"{name} was not made of a MoE (no converted_from in its config.json), so there is no "
            f"family to go back to"
        )
    try:
        return dict(origin["config"]), Layout.from_json(origin["layout"])
    except (KeyError, TypeError, ValueError) as problem:
        raise CheckpointError(f"{name}: converted_from in its config.json is broken") from problem


def _config(name: str, settings: dict[str, Any]) -> PreTrainedConfig:
    try:
        found: PreTrainedConfig = CONFIG_MAPPING[settings["model_type"]].from_dict(dict(settings))
    except (KeyError, TypeError, ValueError) as problem:
        raise CheckpointError(f"{name}: converted_from in its config.json is broken") from problem
    return found


def _with_dtype(settings: dict[str, Any], chain: CoeConfig) -> dict[str, Any]:
    """The MoE's own config.json, but of the type that the weights have now."""
    keys = [key for key in ("dtype", "torch_dtype") if key in settings]
    now = json.loads(chain.to_json_string()).get("dtype")
    return settings | dict.fromkeys(keys, now) if now else settings


def _check_scales(checkpoint: Checkpoint, shapes: dict[str, Shape]) -> None:
    scales = {name: checkpoint.tensor(name).abs().max() for name in shapes if is_scale(name)}
    active = {name: float(value) for name, value in scales.items() if value != 0}  # NaN is not 0
    if active:
        raise UnsupportedModelError(
            f"{checkpoint.name}: {len(active)} of {len(scales)} added iterations have learned "
            f"something (scales up to {max(active.values()):.3g}), for which a MoE has no place. "
            f"--first-iteration-only leaves out their norms, routers and scales: the MoE then "
            f"computes what the chain computes with active_iterations=1, not what it does now"
        )
