"""Upcycling: a dense Llama and a library of LoRA adapters become one real MoE on disk.

Expert e's MLP is the base's MLP with adapter e merged in; attention, norms and embeddings are
shared. The result has Mixtral's architecture, so transformers, vLLM and every tool for MoE
models open it. With all weight on expert e it computes exactly base + adapter e.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from expertmix.core.progress import Progress, quiet
from expertmix.errors import ConfigError
from expertmix.models.checkpoint import Checkpoint
from expertmix.models.fitting import fit_routers, load_routers, random_routers
from expertmix.models.folders import building, check_free
from expertmix.models.library import Library
from expertmix.models.mixtral import (
    check_adapters,
    check_base,
    check_routers,
    expert_names,
    mixtral_config,
    write_mixtral,
)
from expertmix.models.regression import METHODS


def upcycle(
    base: str | Path,
    library: Library,
    out: str | Path,
    *,
    router: str | Path | Mapping[int, Tensor] = "logistic",
    texts: Mapping[str, Sequence[str]] | None = None,
    top_k: int = 2,
    include_base: bool = True,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    progress: Progress = quiet,
) -> Path:
    """Writes a Mixtral-architecture MoE of a base model and LoRA adapters.

    Weights are streamed tensor by tensor, so writing takes the memory of a few matrices (fitting
    a router holds the dense base besides). `out` appears whole at the end, or not at all.

    Args:
        base: folder or hub id of a Llama or Mistral model.
        library: adapters on MLP projections (gate, up, down) of that base.
        out: folder that does not exist yet, or is empty.
        router: "logistic" or "ridge", fitted to `texts` without a training run; "random", the
            control; a file of `save_routers`; or router weights, layer -> [E, H].
        texts: expert name -> a few texts that it should serve; only for a fitted router.
        top_k: experts per token; their softmax weights are renormalized to sum to one.
        include_base: make the unchanged base MLP expert 0, named "base".
        dtype: of the written weights; defaults to the base's own.
        max_shard_bytes: size of a weights file.
        progress: called with (stage, done, total).

    Returns:
        `out`.

    Raises:
        UnsupportedModelError: Mixtral does not compute what this base computes.
        CheckpointError: base or adapters are missing, broken or do not fit each other.
        ConfigError: router, texts or top_k do not fit the experts.
        OutputError: `out` is in the way or cannot be written.
    """
    out = Path(out)
    check_free(out)
    checkpoint = Checkpoint.open(base)
    source = checkpoint.config()
    check_base(checkpoint, source)
    check_adapters(checkpoint, library)
    names = expert_names(library, include_base=include_base)
    config = mixtral_config(source, len(names), _check_top_k(top_k, len(names)))
    config.dtype = dtype or checkpoint.tensor("model.norm.weight").dtype
    routers = _given(router, texts, source, names)
    if routers is None:
        routers = fit_routers(
            *_load(checkpoint.folder), library, texts or {}, method=str(router),
            top_k=top_k, include_base=include_base, progress=progress,
        )  # fmt: skip
    check_routers(routers, config)
    with building(out) as folder:
        write_mixtral(
            folder, checkpoint, library, routers, config,
            include_base=include_base, max_shard_bytes=max_shard_bytes, progress=progress,
        )  # fmt: skip
    return out


def _check_top_k(top_k: int, experts: int) -> int:
    if not 1 <= top_k <= experts:
        raise ConfigError(f"top_k must be between 1 and {experts} (the experts), not {top_k}")
    return top_k


def _given(
    router: str | Path | Mapping[int, Tensor],
    texts: Mapping[str, Sequence[str]] | None,
    source: PreTrainedConfig,
    names: tuple[str, ...],
) -> Mapping[int, Tensor] | None:
    """The routers that need no fitting; None where they are fitted."""
    if isinstance(router, Mapping):
        return router
    if router == "random":
        return random_routers(source, len(names))
    if router not in METHODS:
        return load_routers(router, names)
    if texts is None:
        raise ConfigError(f"router {router!r} is fitted to texts: give `texts`, a few per expert")
    return None


def _load(folder: Path) -> tuple[Any, Any]:
    local: dict[str, Any] = {"trust_remote_code": False}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **local)
    return model.train(False), AutoTokenizer.from_pretrained(folder, **local)
