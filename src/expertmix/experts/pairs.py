"""Which tokens call which experts, sorted by expert, so that each expert multiplies one block.

Knows numbers of tokens and experts; no weight of a model, and no product.

Legend: T tokens, K experts per token, E experts, P pairs of a token and an expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Chunk(NamedTuple):
    """The pairs of some experts, each with a block of rows.

    Attributes:
        experts: Their numbers; all of them are called.
        counts: How many rows each has.
        rows: Where they stand among all pairs.
        tokens: (b,) the token of each row.
    """

    experts: list[int]
    counts: list[int]
    rows: slice
    tokens: Tensor


@dataclass(frozen=True)
class Pairs:
    """Pairs that are computed, expert after expert, and by token inside an expert.

    Attributes:
        tokens: (P,) the token of each pair.
        places: (P,) where each pair stands in the flattened (T, K).
        counts: Pairs of each expert, for all E.
    """

    tokens: Tensor
    places: Tensor
    counts: tuple[int, ...]

    @classmethod
    def of(cls, index_TK: Tensor, experts: int, kept_TK: Tensor | None = None) -> Pairs:
        """Sort.

        Args:
            index_TK: Expert numbers; those from E on belong to another process and are left out.
            experts: E.
            kept_TK: Pairs to compute; None for all.
        """
        if kept_TK is not None:
            index_TK = index_TK.masked_fill(~kept_TK, experts)
        sorted_P, order_P = index_TK.reshape(-1).sort(stable=True)
        counts = torch.bincount(sorted_P, minlength=experts)[:experts].tolist()
        places_P = order_P[: sum(counts)]
        tokens_P = places_P.div(index_TK.shape[1], rounding_mode="floor")
        return cls(tokens_P, places_P, tuple(counts))

    def chunks(self, size: int) -> Iterator[Chunk]:
        """Experts that are called, in turn, so many at a time as have `size` rows together.

        An expert with more is alone.
        """
        begin = end = 0
        experts: list[int] = []
        counts: list[int] = []
        for expert, count in enumerate((*self.counts, 0)):
            last = expert == len(self.counts)
            if experts and (last or end - begin + count > size):
                rows = slice(begin, end)
                yield Chunk(experts, counts, rows, self.tokens[rows])
                begin, experts, counts = end, [], []
            if count:
                experts.append(expert)
                counts.append(count)
                end += count
