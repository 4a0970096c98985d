"""Models by name: a hub id, a local folder, or the words `default` and `default-moe`.

Pickled weights are refused, since reading them can run code. A model can be looked at without its
weights: `outline` builds its structure only.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import expertmix.models.coe  # noqa: F401  transformers then knows the type `coe`
from expertmix.bindings.record import sites
from expertmix.core.progress import Progress, quiet
from expertmix.core.site import SiteInfo
from expertmix.errors import CheckpointError, ConfigError, UnsupportedModelError
from expertmix.models.default import default_moe_path, default_path
from expertmix.study.names import DEFAULT, DEFAULT_MOE, Dtype

_AUTO: Any = AutoModelForCausalLM  # its annotations do not tell what these calls return
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
_NO_LIMIT = 10**9  # tokenizers without one say about 10**30


@dataclass(frozen=True, eq=False, slots=True)
class Outline:
    """A model without its weights.

    Attributes:
        name: As the user named it.
        architecture: Class of the model.
        sites: Its sites.
        context: Tokens it can read, or None where there is no limit.
        tokenizer: Its tokenizer.
    """

    name: str
    architecture: str
    sites: tuple[SiteInfo, ...]
    context: int | None
    tokenizer: Any


def locate(name: str, progress: Progress = quiet) -> str:
    """Where transformers finds a model: a checked folder, or the hub id itself.

    Args:
        name: `default`, `default-moe` (built on first use), a folder, or a hub id.
        progress: Told of the building.

    Raises:
        CheckpointError: No such folder, no model in it, or pickled weights only.
        MissingDependencyError: The default LM is not installed.
    """
    if name == DEFAULT:
        return str(default_path(progress))
    if name == DEFAULT_MOE:
        return str(default_moe_path(progress))
    if Path(name).is_dir():
        _check_folder(Path(name))
    elif Path(name).is_file():
        raise CheckpointError(f"{name} is a file: name the folder of a model, with its config.json")
    elif _looks_local(name):
        raise CheckpointError(
            f"there is no model folder {name}. Give a folder with config.json and *.safetensors, a "
            f"hub id such as owner/model, or one of the words {DEFAULT} and {DEFAULT_MOE}."
        )
    return name


@dataclass(frozen=True, eq=False, slots=True)
class Skeleton:
    """A causal LM without its weights.

    Attributes:
        name: As the user named it.
        model: Its modules, on the meta device.
        context: Tokens it can read, or None where there is no limit.
        tokenizer: Its tokenizer.
    """

    name: str
    model: Any
    context: int | None
    tokenizer: Any

    @property
    def architecture(self) -> str:
        """Class of the model."""
        return type(self.model).__name__


def skeleton(name: str, progress: Progress = quiet) -> Skeleton:
    """A model's structure, context and tokenizer, without reading its weights.

    Raises:
        UnsupportedModelError: Transformers does not know it as a causal LM.
        CheckpointError: No such model, or a broken one.
    """
    where = locate(name, progress)
    progress("reading the model's structure", 0, 0)
    with _load_errors(name):
        config = AutoConfig.from_pretrained(where, trust_remote_code=False)
        with torch.device("meta"):
            model = _AUTO.from_config(config, trust_remote_code=False)
    tokenizer = load_tokenizer(name)
    return Skeleton(name, model, context_length(config, tokenizer), tokenizer)


def outline(name: str, progress: Progress = quiet) -> Outline:
    """A model's sites, context and tokenizer, without reading its weights.

    Raises:
        NoSitesError: A dense model.
        UnsupportedModelError: A family that routes in a way that cannot be recorded faithfully, or
            that transformers does not know.
        CheckpointError: No such model, or a broken one.
    """
    bare = skeleton(name, progress)
    found = sites(bare.model)
    _check_choices(name, found)
    return Outline(name, bare.architecture, found, bare.context, bare.tokenizer)


def _check_choices(name: str, found: tuple[SiteInfo, ...]) -> None:
    for info in found:
        if info.top_k > info.num_experts:
            raise CheckpointError(
                f"{name}: {info.site} is to choose {info.top_k} of {info.num_experts} experts: "
                f"its config.json is wrong"
            )


def load_tokenizer(name: str) -> Any:
    """A model's tokenizer.

    Raises:
        CheckpointError: There is none.
    """
    where = locate(name)
    with _load_errors(name):
        return AutoTokenizer.from_pretrained(where, trust_remote_code=False)


def load_model(
    name: str, *, dtype: Dtype = "auto", device: str = "auto", progress: Progress = quiet
) -> Any:
    """A causal LM in evaluation mode.

    Args:
        name: See `locate`.
        dtype: Of the weights; `auto` is what they are stored in.
        device: `auto` takes an accelerator where there is one.
        progress: Told of the building of a default model.

    Raises:
        CheckpointError: Missing, broken, incomplete, or pickled.
        ConfigError: No such device.
    """
    where = locate(name, progress)
    progress("loading weights", 0, 0)
    with _load_errors(name):
        model, found = _AUTO.from_pretrained(
            where,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are told below
        )
    wrong = sorted(key for key, *_ in found["mismatched_keys"])
    if wrong:
        raise CheckpointError(
            f"{name}: {len(wrong)} tensors have another shape than its config.json says, such as "
            f"{wrong[0]}. Use weights and config of the same model."
        )
    missing = sorted(found["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{name} lacks {len(missing)} tensors that its architecture needs, such as "
            f"{missing[0]}: random weights in their place would mislead. Use a complete checkpoint."
        )
    return _placed(model.eval(), device)


def context_length(config: Any, tokenizer: Any) -> int | None:
    """Tokens that a model can read: the smaller one of what config and tokenizer say."""
    text = getattr(config, "text_config", None) or config
    limits = [getattr(text, "max_position_embeddings", None), tokenizer.model_max_length]
    known = [int(limit) for limit in limits if limit and 0 < limit < _NO_LIMIT]
    return min(known, default=None)


def _looks_local(name: str) -> bool:
    return name.startswith((".", "~", os.sep)) or name.count("/") > 1  # a hub id has one at most


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        adapter = (folder / "adapter_config.json").is_file()
        hint = (
            "; it is a LoRA adapter: name its base, and give it as a library to "
            "`expertmix compose` or `expertmix convert`"
            if adapter
            else ""
        )
        raise CheckpointError(f"{folder} is not a model folder: no config.json in it{hint}")
    if any(folder.glob("*.safetensors")):
        return
    pickled = sorted(file.name for pattern in _PICKLED for file in folder.glob(pattern))
    if pickled:
        raise CheckpointError(
            f"{folder} has pickled weights only ({pickled[0]}): reading a pickle can run any code "
            f"that is in it. If you trust its origin, convert it once: "
            f"AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder) writes "
            f"safetensors."
        )
    raise CheckpointError(f"{folder} has no weights: no *.safetensors in it")


@contextmanager
def _load_errors(name: str) -> Iterator[None]:
    try:
        yield
    except SafetensorError as problem:
        raise CheckpointError(
            f"{name}: its weights are broken: {problem}. Get it again."
        ) from problem
    except (OSError, RuntimeError) as problem:
        raise CheckpointError(
            f"{name} cannot be loaded: {_first_line(problem)}. Is it a folder, or a hub id of a "
            f"model with safetensors? (Without network, models must be in the hub's cache.)"
        ) from problem
    except StrictDataclassError as problem:
        reason = " ".join(str(problem).split())
        raise CheckpointError(f"{name}: a wrong value in its config.json: {reason}") from problem
    except (ValueError, KeyError, TypeError) as problem:
        raise UnsupportedModelError(
            f"transformers cannot open {name} as a causal LM: {_first_line(problem)}"
        ) from problem


def _first_line(problem: Exception) -> str:
    return str(problem).strip().partition("\n")[0].rstrip(".")


def _placed(model: Any, device: str) -> Any:
    if device == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        device = str(accelerator or "cpu")
    if device.startswith("meta"):
        raise ConfigError(f"cannot use device {device!r}: it computes nothing. Use cpu, cuda, …")
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as problem:  # what torch raises for a device it lacks
        raise ConfigError(f"cannot use device {device!r}: {_first_line(problem)}") from problem
