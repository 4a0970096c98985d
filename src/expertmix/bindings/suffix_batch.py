"""What a suffix keeps of questions that were read: `SuffixBatch`, and its contexts as a cache.

Knows keys and values, padded on the left; no model.

Legend: B questions, P context columns, A tail columns, H hidden, O options, W longest option.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from expertmix.bindings.head import Predictions
from expertmix.bindings.slots import Slots
from expertmix.bindings.sparing import Fixed
from expertmix.bindings.split_attention import Attended, Beside
from expertmix.bindings.tree import Tree


@dataclass(frozen=True, eq=False, slots=True)
class SuffixBatch:
    """Questions that were read before.

    Attributes:
        hidden: (B, A, H) what enters the first critical layer.
        position: (B, A) place of each in its text.
        caches: Per layer from there on, keys and values of the context.
        masks: Attention masks of the tail, as the model takes them.
        slots: The decision tokens of the tail.
        predictions: What the tail predicts.
        counting: (N,) flat numbers of the tail's tokens that are no padding.
        fixed: What the experts of the first critical site gave; filled by the first pass.
        attended: What the attention of the first critical layer gave; likewise.
    """

    hidden: Tensor
    position: Tensor
    caches: tuple[tuple[Tensor, Tensor], ...]
    masks: Any
    slots: Slots
    predictions: Predictions
    counting: Tensor
    fixed: Fixed
    attended: Attended

    def cache(self, first: int, *, split: bool) -> DynamicCache:
        """The contexts, as layers from `first` on read them, apart from the tail or joined."""
        cache = DynamicCache()
        unread: Any = DynamicLayer
        cache.layers = [unread() for _ in range(first)]
        kept = [self.attended, *[None] * (len(self.caches) - 1)]
        cache.layers += [
            _Context(Beside(*pair, attended), split=split)
            for pair, attended in zip(self.caches, kept, strict=True)
        ]
        return cache


class _Context(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values of a context, which a pass reads and does not extend."""

    def __init__(self, beside: Beside, *, split: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values, self.is_initialized = beside.keys, beside.values, True
        self._beside, self._split = beside, split

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Both parts together; or the tail, with a mark that says which context it has."""
        if self._split:
            self._beside.mark(key_states)
            return key_states, value_states
        keys, values = self._beside.keys, self._beside.values
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)


def contexts(
    states: Sequence[Mapping[str, Tensor]], layer: int, length: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(B, heads, P, d) keys and values of a layer, from the states of questions."""
    keys, values = (
        _left([state[f"{name}.{layer}"] for state in states], length).to(device)
        for name in ("keys", "values")
    )
    return keys, values


def predictions_of(tree: Tree, before: int) -> Predictions:
    """Of the tail, in a pass that has `before` columns in front of it."""
    rows = torch.arange(len(tree.ids), device=tree.ids.device)[:, None, None]
    source = rows * (before + tree.tail) + before + tree.source
    return Predictions.of(source, tree.target, tree.predicted)


def _left(parts: Sequence[Tensor], length: int) -> Tensor:
    """(B, heads, length, d), padded on the left."""
    heads, _, width = parts[0].shape
    joined = parts[0].new_zeros(len(parts), heads, length, width)
    for row, one in enumerate(parts):
        joined[row, :, length - one.shape[1] :] = one
    return joined
