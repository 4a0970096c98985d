"""Writing a Mixtral on disk whose experts are one dense base plus LoRA adapters.

Knows the names of Llama's and Mixtral's tensors, where the two architectures compute the same,
and which adapters fit. Knows nothing of how routers are fitted. Streams tensor by tensor.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import MixtralConfig, PreTrainedConfig

from expertmix.core.progress import Progress
from expertmix.errors import CheckpointError, ConfigError, UnsupportedModelError
from expertmix.models.checkpoint import DESCRIPTION_FILE, Checkpoint
from expertmix.models.library import Adapter, Library
from expertmix.models.shards import Shape, Spec, write_tensors

BASE_EXPERT = "base"

# Where Mixtral's forward is Llama's, number for number.
_EXACT = ("llama", "mistral")
_REASONS = {
    "qwen2": "it has biases in attention, Mixtral has none",
    "qwen3": "it normalizes queries and keys, Mixtral does not",
    "olmo": "its norms have no weights",
    "olmo2": "it normalizes after attention and MLP",
    "gemma": "it scales embeddings and shifts norms",
    "gemma2": "it scales embeddings and normalizes after attention and MLP",
    "gemma3_text": "it scales embeddings and normalizes queries and keys",
    "phi3": "its projections are fused",
    "granite": "it multiplies embeddings, residuals and logits",
    "smollm3": "some of its layers have no position encoding",
    "gpt2": "its MLP has no gate",
}
_PROJECTIONS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_MLP = re.compile(r"^model\.layers\.\d+\.mlp\.(gate|up|down)_proj$")
_COPIED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range",
    "rms_norm_eps", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings",
    "attention_dropout", "rope_parameters", "head_dim",
)  # fmt: skip


def expert_names(library: Library, *, include_base: bool = True) -> tuple[str, ...]:
    """Names of the MoE's experts in order: the base first where it is one, then the adapters.

    Raises:
        CheckpointError: an adapter is itself named "base".
    """
    if not include_base:
        return library.names
    if BASE_EXPERT in library.names:
        raise CheckpointError(f"an adapter is named {BASE_EXPERT!r}, as the base expert: rename it")
    return (BASE_EXPERT, *library.names)


def write_mixtral(
    folder: Path,
    checkpoint: Checkpoint,
    library: Library,
    routers: Mapping[int, Tensor],
    config: MixtralConfig,
    *,
    include_base: bool,
    max_shard_bytes: int,
    progress: Progress,
) -> None:
    """Writes weights, config, tokenizer and description of the MoE into an existing folder.

    Args:
        folder: empty.
        checkpoint: the dense base, already checked.
        library: its adapters, already checked.
        routers: layer -> router weight [E, H].
        config: of the MoE; its dtype is that of the written weights.
        include_base: the unchanged base MLP is expert 0.
        max_shard_bytes: size of a weights file.
        progress: told the number of tensors written.
    """
    produce = _Producer(checkpoint, library, routers, first=int(include_base))
    assert isinstance(config.dtype, torch.dtype)
    specs = {name: Spec(shape, config.dtype) for name, shape in _shapes(config).items()}
    written = write_tensors(folder, specs, produce, max_shard_bytes)
    for done, _ in enumerate(written, 1):
        progress("writing experts", done, len(specs))
    checkpoint.copy_tokenizer(folder)
    names = expert_names(library, include_base=include_base)
    config.expert_names = list(names)  # where `record` finds them
    config.save_pretrained(folder)
    _describe(folder, checkpoint, names, config)


def check_base(checkpoint: Checkpoint, config: PreTrainedConfig) -> None:
    """Refuses a base whose computation Mixtral does not repeat exactly.

    Raises:
        UnsupportedModelError: naming what differs.
        CheckpointError: a tensor of the base is missing.
    """
    kind = config.model_type
    if kind not in _EXACT:
        reason = _REASONS.get(kind, f"only {' and '.join(_EXACT)} are known to be exact")
        raise UnsupportedModelError(f"cannot upcycle {checkpoint.name} ({kind}): {reason}")
    if getattr(config, "quantization_config", None):
        raise UnsupportedModelError(f"cannot upcycle {checkpoint.name}: its weights are quantized")
    needed = {_source(name) for name in _shapes(mixtral_config(config, 1, 1))} - {None}
    for name in sorted(set(checkpoint.files) - needed):
        if not name.endswith("rotary_emb.inv_freq") and not _is_tied_copy(name, config):
            raise UnsupportedModelError(
                f"cannot upcycle {checkpoint.name}: Mixtral has no place for its tensor {name!r}"
            )
    if missing := sorted(str(name) for name in needed - set(checkpoint.files)):
        raise CheckpointError(f"{checkpoint.name} has no tensor {missing[0]!r}")


def check_adapters(checkpoint: Checkpoint, library: Library) -> None:
    """Refuses adapters that change more than this base's MLPs.

    Raises:
        CheckpointError: naming adapter and module.
    """
    for adapter in library:
        for module, update in adapter.updates.items():
            if not _MLP.match(module):
                raise CheckpointError(
                    f"adapter {adapter.name!r} changes {module!r}: only MLP projections can become "
                    "an expert (attention is shared)"
                )
            _check_shape(checkpoint, adapter, module, update.shape)


def _check_shape(checkpoint: Checkpoint, adapter: Adapter, module: str, shape: Shape) -> None:
    if f"{module}.weight" not in checkpoint.files:
        raise CheckpointError(f"adapter {adapter.name!r}: {checkpoint.name} has no {module!r}")
    if checkpoint.shape(f"{module}.weight") != shape:
        raise CheckpointError(
            f"adapter {adapter.name!r} was made for another base: {module!r} is "
            f"{checkpoint.shape(f'{module}.weight')} in {checkpoint.name}, {shape} in the adapter"
        )


def mixtral_config(source: PreTrainedConfig, experts: int, top_k: int) -> MixtralConfig:
    """The config of a Mixtral that repeats `source` with `experts` MLPs a layer."""
    config = MixtralConfig(
        **{key: getattr(source, key) for key in _COPIED},
        sliding_window=source.sliding_window if source.model_type == "mistral" else None,
        num_local_experts=experts,
        num_experts_per_tok=top_k,
    )
    config.architectures = ["MixtralForCausalLM"]
    return config


def _shapes(config: MixtralConfig) -> dict[str, Shape]:
    """Every tensor of the MoE on disk, in the order of writing."""
    width, middle = config.hidden_size, config.intermediate_size
    head = config.head_dim or width // config.num_attention_heads
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (config.vocab_size, width)}
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}"
        shapes |= {
            f"{at}.input_layernorm.weight": (width,),
            f"{at}.self_attn.q_proj.weight": (queries, width),
            f"{at}.self_attn.k_proj.weight": (keys, width),
            f"{at}.self_attn.v_proj.weight": (keys, width),
            f"{at}.self_attn.o_proj.weight": (width, queries),
            f"{at}.post_attention_layernorm.weight": (width,),
            f"{at}.block_sparse_moe.gate.weight": (config.num_local_experts, width),
        }
        for expert in range(config.num_local_experts):
            inside = f"{at}.block_sparse_moe.experts.{expert}"
            shapes[f"{inside}.w1.weight"] = (middle, width)
            shapes[f"{inside}.w2.weight"] = (width, middle)
            shapes[f"{inside}.w3.weight"] = (middle, width)
    shapes["model.norm.weight"] = (width,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, width)
    return shapes


_EXPERT = re.compile(r"^(model\.layers\.\d+)\.block_sparse_moe\.experts\.(\d+)\.(w[123])\.weight$")
_GATE = re.compile(r"^model\.layers\.(\d+)\.block_sparse_moe\.gate\.weight$")


def _source(name: str) -> str | None:
    """The base's tensor from which a tensor of the MoE is made; None for a router."""
    if match := _EXPERT.match(name):
        return f"{match[1]}.mlp.{_PROJECTIONS[match[3]]}.weight"
    return None if _GATE.match(name) else name


def _is_tied_copy(name: str, config: PreTrainedConfig) -> bool:
    return name == "lm_head.weight" and bool(config.tie_word_embeddings)


class _Producer:
    """Makes each tensor of the MoE when it is about to be written."""

    def __init__(
        self, base: Checkpoint, library: Library, routers: Mapping[int, Tensor], *, first: int
    ) -> None:
        self._base, self._library, self._routers, self._first = base, library, routers, first

    def __call__(self, name: str) -> Tensor:
        if match := _GATE.match(name):
            return self._routers[int(match[1])]
        source = _source(name)
        assert source is not None
        weight = self._base.tensor(source)
        match = _EXPERT.match(name)
        return self._merged(weight, source, int(match[2]) - self._first) if match else weight

    def _merged(self, weight: Tensor, source: str, index: int) -> Tensor:
        module = source.removesuffix(".weight")
        if index < 0 or module not in self._library.adapters[index].updates:
            return weight
        return weight.float() + self._library.adapters[index].delta(module)


def check_routers(routers: Mapping[int, Tensor], config: MixtralConfig) -> None:
    """Refuses routers that do not fit the MoE.

    Raises:
        ConfigError: naming the layer.
    """
    expected = (config.num_local_experts, config.hidden_size)
    for layer in range(config.num_hidden_layers):
        shape = tuple(routers[layer].shape) if layer in routers else None
        if shape != expected:
            raise ConfigError(f"the router of layer {layer} must be {expected}, not {shape}")


def _describe(
    folder: Path, base: Checkpoint, names: tuple[str, ...], config: MixtralConfig
) -> None:
    description: dict[str, Any] = {
        "format": 1,
        "base": base.name,
        "experts": names,
        "top_k": config.num_experts_per_tok,
    }
    (folder / DESCRIPTION_FILE).write_text(json.dumps(description, indent=1) + "\n")
