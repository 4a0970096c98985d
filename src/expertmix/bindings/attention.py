"""Attention masks of trees, as models of transformers take them, and the models that take none.

A row whose options stand side by side is right only where every layer attends through a mask, full
or of a sliding window. What else reads a text (state spaces, convolutions, indexed attention) would
let options see each other.

Knows a config's words; no model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from expertmix.bindings.tree import Tree
from expertmix.errors import UnsupportedModelError

_KINDS = frozenset({"full_attention", "sliding_attention"})
_MASKED = ("eager", "sdpa")
_BY_LENGTH = ("dynamic", "longrope")


def refuse_other(config: Any) -> None:
    """Refuse a stack of layers that is not attention through a mask alone.

    Raises:
        UnsupportedModelError: With the reason.
    """
    other = set(getattr(config, "layer_types", None) or ()) - _KINDS
    if other:
        raise UnsupportedModelError(f"it has layers of type {', '.join(sorted(other))}")
    if config._attn_implementation not in _MASKED:
        raise UnsupportedModelError(
            f"its attention implementation {config._attn_implementation!r} takes no mask of its "
            f"own; load the model with attn_implementation='sdpa'"
        )
    by_length = sorted(_rope_types(getattr(config, "rope_parameters", None)) & set(_BY_LENGTH))
    if by_length:
        raise UnsupportedModelError(
            f"its positions depend on the longest text of a batch (rope type {by_length[0]!r})"
        )


def _rope_types(parameters: Any) -> set[str]:
    """Of all layers; some families have one for each kind of layer."""
    if not isinstance(parameters, dict):
        return set()
    inner = (_rope_types(value) for value in parameters.values())
    return {str(parameters.get("rope_type"))}.union(*inner)


def masks(config: Any, tree: Tree, queries: slice, dtype: torch.dtype) -> Any:
    """Masks of some columns of the rows: one, or one by kind of layer."""
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    if not kinds:
        kinds = {"full_attention" if window is None else "sliding_attention"}
    sizes = {"full_attention": None, "sliding_attention": window}
    made = {
        kind: _mask(config, tree.visible(sizes[kind])[:, queries], dtype) for kind in sorted(kinds)
    }
    return made if len(made) > 1 else next(iter(made.values()))


def _mask(config: Any, visible: Tensor, dtype: torch.dtype) -> Tensor:
    if config._attn_implementation == "sdpa":
        return visible[:, None]
    zeros = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return zeros.masked_fill(~visible, torch.finfo(dtype).min)[:, None]
