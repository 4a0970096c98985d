"""Who was found to be like a sample: `Neighborhood`.

Knows numbers of references; not how they were found.

Legend: B samples, H embedding width, k neighbors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False, slots=True)
class Neighborhood:
    """Neighbors of B samples, nearest first.

    Attributes:
        indices: (B, k) int64 numbers of references; -1 is nobody.
        similarity: (B, k) cosines, 0 of nobody.
        distance: (B, k), infinite of nobody.
        weights: (B, k) kernel weights that sum to 1, all 0 in a row without neighbors.
        dropped: (B,) int64: near-duplicates that were met, and left out, before k were found.
        query: (B, H) embeddings of the samples.
    """

    indices: Tensor
    similarity: Tensor
    distance: Tensor
    weights: Tensor
    dropped: Tensor
    query: Tensor

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def present(self) -> Tensor:
        """(B, k) bool: there is a neighbor."""
        return self.indices >= 0

    def rows(self, numbers: Sequence[int]) -> Neighborhood:
        """Of some of the samples."""
        at = torch.tensor(list(numbers), dtype=torch.int64)
        return Neighborhood(
            self.indices[at], self.similarity[at], self.distance[at], self.weights[at],
            self.dropped[at], self.query[at],
        )  # fmt: skip
