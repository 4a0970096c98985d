"""When a pass through a model starts and ends, and over which tokens: told to a tap by hooks.

Serves everything that routes inside a model of transformers, ours and others'. Knows the arguments
of its forward, and nothing of routers.

Legend: B rows of the batch, S columns of this pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from threading import get_ident
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from expertmix.core.protocols import Tap
from expertmix.errors import UnsupportedModelError, UnsupportedRuntimeError

_Hook = TypeVar("_Hook", bound=Callable[..., Any])


def takes_tokens(module: nn.Module) -> bool:
    """Whether it is a full model of transformers, which is given ids or embeddings."""
    return "PreTrainedModel" in {base.__name__ for base in type(module).__mro__} and bool(
        {"input_ids", "inputs_embeds"} & set(inspect.signature(module.forward).parameters)
    )


def name_of(model: nn.Module) -> str:
    """Last part of the name or path that a model was loaded from, or its class."""
    path = str(getattr(getattr(model, "config", None), "name_or_path", ""))
    return path.rstrip("/").rpartition("/")[2] or type(model).__name__


def full_models(model: nn.Module, sites: Iterable[str]) -> list[nn.Module]:
    """Every full model around a site: users may call `model` or `model.model`.

    Raises:
        UnsupportedModelError: There is none.
    """
    names = tuple(sites)
    found = [
        module
        for path, module in model.named_modules()
        if takes_tokens(module)
        and any(site.startswith(f"{path}." if path else "") for site in names)
    ]
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__} is no full model of transformers: without the token ids or "
            f"embeddings that one is given, decisions cannot be named by token. Record the "
            f"PreTrainedModel around it."
        )
    return found


def refuse_two_texts(model: nn.Module, doing: str) -> None:
    """Refuse an encoder with a decoder.

    Raises:
        UnsupportedModelError: One pass reads two texts, so its tokens have no one name.
    """
    config: Any = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} is an encoder with a decoder: one pass reads two texts, and "
            f"{doing} would mix up their tokens. Use a decoder-only model."
        )


def hook_passes(
    model: nn.Module, tap: Tap, stack: ExitStack, *, recover: Callable[[], None] = lambda: None
) -> None:
    """The outermost model that runs opens and closes the pass; the stack removes the hooks.

    Args:
        model: A full model.
        tap: Told of every pass.
        stack: Holds the hooks.
        recover: Called when a pass turns out to have been broken off without a word.

    Raises:
        UnsupportedModelError: An encoder with a decoder.
    """
    refuse_two_texts(model, "a recording")
    signature = inspect.signature(model.forward)
    opener: int | None = None  # the thread whose call of this model opened the pass

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal opener
        refuse_tracing()
        _refuse_capturing()
        if opener == get_ident():  # torch calls no hook after a KeyboardInterrupt
            tap.abandon()
            recover()
        if tap.open:
            return
        given = signature.bind_partial(*args, **kwargs).arguments
        ids_BS, real_BS, past = read_inputs({**given, **given.get("kwargs", {})})
        tap.begin(ids_BS, real_BS, past=past)
        opener = get_ident()

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        nonlocal opener
        if opener == get_ident():
            opener = None
            tap.abandon() if output is None else tap.end()

    stack.callback(model.register_forward_pre_hook(before, with_kwargs=True).remove)
    stack.callback(model.register_forward_hook(after, always_call=True).remove)


def _tracing() -> None:
    raise UnsupportedRuntimeError(
        "torch.compile is tracing the model: hooks do not run inside a compiled graph. Record "
        "the uncompiled model; with a static cache, call generate(..., disable_compile=True)."
    )


_disable: Any = torch.compiler.disable
_raise_tracing = _disable(_tracing, reason="expertmix records no compiled graph")


def untraced(hook: _Hook) -> _Hook:
    """The same hook, which torch.compile leaves out of its graphs and calls as it is."""
    left_out: _Hook = _disable(hook, reason="expertmix decides outside of compiled graphs")
    return left_out


def refuse_tracing() -> None:
    """Raise where torch.compile is tracing.

    Raises:
        UnsupportedRuntimeError: Hooks do not run inside a compiled graph.
    """
    if torch.compiler.is_compiling():
        _raise_tracing()  # outside of the graph: dynamo swallows what is raised inside


def _refuse_capturing() -> None:
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise UnsupportedRuntimeError("a CUDA graph is being captured: its replays run no hooks")


def read_inputs(given: dict[str, Any]) -> tuple[Tensor, Tensor, int]:
    """(B, S) token ids, (B, S) which of them are real, and how many columns the cache holds.

    Raises:
        UnsupportedRuntimeError: The tokens cannot be named.
    """
    ids_BS: Any = given.get("input_ids")
    embeds: Any = given.get("inputs_embeds")
    if ids_BS is None and embeds is None:
        raise UnsupportedRuntimeError(
            "the model was given neither input_ids nor inputs_embeds: its tokens have no names"
        )
    if ids_BS is None:
        ids_BS = torch.full(embeds.shape[:2], -1, dtype=torch.int64, device=embeds.device)
    past = _cached(given)
    return ids_BS, _real(given.get("attention_mask"), ids_BS, past), past


def _cached(given: dict[str, Any]) -> int:
    caches = (given.get(name) for name in ("cache", "past_key_values"))
    cache = next((cache for cache in caches if cache is not None), None)
    if type(cache).__name__ == "PagedAttentionCache":
        raise UnsupportedRuntimeError(
            "continuous batching packs many requests into one row: decisions cannot be named by "
            "token. Use generate()."
        )
    if cache is None:
        return 0
    try:
        return int(cache.get_seq_length())
    except ValueError as problem:
        raise UnsupportedRuntimeError(
            f"the model's {type(cache).__name__} holds states without a place for each token (a "
            f"model without attention): decisions cannot be named by token. Run it with "
            f"use_cache=False, or use a router without memory, such as SpectR, unrecorded."
        ) from problem


def _real(mask: Any, ids_BS: Tensor, past: int) -> Tensor:
    """(B, S) bool from a 2-D mask over keys, or from a 4-D one: who may attend to itself."""
    columns = ids_BS.shape[1]
    if isinstance(mask, dict):
        mask = mask.get("full_attention")
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= columns:
        start = min(past, mask.shape[1] - columns)
        return mask[:, start : start + columns].bool().to(ids_BS.device)
    if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[-1] >= past + columns:
        self_BS = mask[:, 0, -columns:, past : past + columns].diagonal(dim1=1, dim2=2)
        real_BS = self_BS if self_BS.dtype == torch.bool else self_BS == 0
        return real_BS.to(ids_BS.device).expand(ids_BS.shape)
    return torch.ones_like(ids_BS, dtype=torch.bool)
