"""Pairs of a token and an adapter, sorted by adapter: then each adapter's part is one product.

Reading for each token the factors of its own few adapters would move tokens × adapters × rank ×
width numbers. Sorted, every adapter is read once. Knows neither directions nor ways up.

Legend: T tokens, m adapters of a token, N = T * m pairs, n pairs of one adapter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Pairs:
    """All pairs of a pass, adapter after adapter.

    Attributes:
        experts: Adapters that occur, rising.
        counts: How many pairs each of them has.
        order: (N,) where each pair stands among the flattened (T, m).
        tokens: (N,) whose pair it is.
    """

    experts: tuple[int, ...]
    counts: list[int]
    order: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, indices: Tensor) -> Pairs:
        """From (T, m) numbers of adapters."""
        flat_N = indices.flatten()
        order_N = flat_N.argsort(stable=True)
        present = [pair for pair in enumerate(torch.bincount(flat_N).tolist()) if pair[1]]
        return cls(
            tuple(expert for expert, _ in present),
            [count for _, count in present],
            order_N,
            order_N // indices.shape[1],
        )

    def parts(self, values: Tensor, most: int) -> Iterator[tuple[int, Tensor]]:
        """Each adapter with its (n, …) part of what its tokens have of (T, …) values.

        They are gathered for several adapters at once, of about so many pairs, not for all: what
        is read again at once is still near, and nothing of size N × … exists.
        """
        start, tokens = 0, torch.split(self.tokens, self._groups(most))
        for tokens_n in tokens:
            stop, held = start, 0
            while held < len(tokens_n):
                held += self.counts[stop]
                stop += 1
            gathered = torch.split(values.index_select(0, tokens_n), self.counts[start:stop])
            yield from zip(self.experts[start:stop], gathered, strict=True)
            start = stop

    def _groups(self, most: int) -> list[int]:
        """How many pairs go together, adapters whole."""
        groups = [0]
        for count in self.counts:
            if groups[-1] and groups[-1] + count > most:
                groups.append(0)
            groups[-1] += count
        return groups

    def unsorted(self, values: Tensor) -> Tensor:
        """(N, …) in the order of the flattened (T, m), from those sorted by adapter."""
        return torch.empty_like(values).index_copy(0, self.order, values)
