"""Search among embeddings: candidates fast, then compared exactly.

Candidates come from a float32 product over all references at once, or from faiss; how near each of
them is, is computed again in float64 from its own row. So what a sample finds depends neither on
the batch that it is in nor on how a product is rounded.

Knows vectors; not what they embed.

Legend: B queries, N references, H embedding width, c candidates.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from expertmix.errors import MissingDependencyError

Metric = Literal["standardized cosine", "centered cosine", "cosine", "euclidean"]
Backend = Literal["exact", "faiss"]
_BLOCK = 1 << 22  # scores that are held at a time
_CONSTANT = 1e-6  # of the mean spread: a dimension that spreads less says nothing
_ROUNDING = 1e-5  # of a float32 product of unit vectors, generously


class Index:
    """N references that can be searched.

    Args:
        embeddings_NH: Theirs, finite.
        metric: See `Neighbors`.
        backend: `exact` or `faiss`: a graph of nearest neighbors (HNSW), approximate.

    Raises:
        MissingDependencyError: faiss is asked for and not installed.
    """

    def __init__(
        self,
        embeddings_NH: Tensor,
        metric: Metric = "standardized cosine",
        backend: Backend = "exact",
    ) -> None:
        self.metric = metric
        self._raw_NH = embeddings_NH
        mean_H = embeddings_NH.mean(0, dtype=torch.float64)
        self._mean_H = torch.zeros_like(mean_H) if metric == "cosine" else mean_H
        plain = metric in ("cosine", "centered cosine")
        self._scale_H = torch.ones_like(mean_H) if plain else _inverse_spread(embeddings_NH, mean_H)
        self._rows_NH = self._placed(embeddings_NH)
        self._half_N = 0.5 * self._rows_NH.square().sum(1) if metric == "euclidean" else None
        self._graph = _graph(self._rows_NH, metric) if backend == "faiss" else None

    def __len__(self) -> int:
        return len(self._raw_NH)

    def _placed(self, embeddings_BH: Tensor) -> Tensor:
        """(B, H) float32 where products say how near two are."""
        moved_BH = embeddings_BH - self._mean_H.float()
        if self.metric == "euclidean":
            return moved_BH
        return functional.normalize(moved_BH * self._scale_H.float(), dim=1)

    def similarities(self, embeddings_BH: Tensor) -> Tensor:
        """(B, N) float32 similarities to all references; 1 or 0 where all of them are the same."""
        mine_BH, own_NH = (
            functional.normalize((one - self._mean_H.float()) * self._scale_H.float(), dim=1)
            for one in (embeddings_BH, self._raw_NH)
        )
        similarity_BN = mine_BH @ own_NH.T
        lost_n = (own_NH == 0).all(1).nonzero().flatten()  # what makes it differ is scaled away
        for row, embedding_H in enumerate(embeddings_BH if len(lost_n) else ()):
            similarity_BN[row, lost_n] = _copies(embedding_H, self._raw_NH[lost_n]).float()
        return similarity_BN

    def candidates(self, embeddings_BH: Tensor, count: int) -> list[Tensor]:
        """Per query the numbers of about the nearest `count` references, all if there are fewer."""
        rows_BH = self._placed(embeddings_BH)
        count = min(count, len(self))
        if count == len(self):
            return [torch.arange(len(self))] * len(rows_BH)
        if self._graph is not None:
            found = torch.from_numpy(self._graph.search(rows_BH.numpy(), count)[1])
            return [numbers[numbers >= 0] for numbers in found]
        size = max(1, _BLOCK // len(self))
        return [
            numbers
            for part_bH in torch.split(rows_BH, size)
            for numbers in self._scores(part_bH).topk(count, dim=1, sorted=False).indices
        ]

    def _scores(self, rows_bH: Tensor) -> Tensor:
        """(b, N), higher is nearer."""
        if self._half_N is None:
            return rows_bH @ self._rows_NH.T
        return torch.addmm(-self._half_N[None], rows_bH, self._rows_NH.T)

    def compare(self, embedding_H: Tensor, numbers_c: Tensor) -> tuple[Tensor, Tensor]:
        """(c,) similarities and (c,) distances of one query to some references, in float64."""
        mine_1H = embedding_H.double()[None] - self._mean_H
        others_cH = self._raw_NH[numbers_c].double() - self._mean_H
        unit_cH, unit_1H = (
            functional.normalize(one * self._scale_H, dim=1) for one in (others_cH, mine_1H)
        )
        similarity_c = (unit_cH * unit_1H).sum(1).clamp(-1, 1)
        lost_c = (unit_cH == 0).all(1)
        if bool(lost_c.any()):
            copies_c = _copies(embedding_H, self._raw_NH[numbers_c])
            similarity_c = torch.where(lost_c, copies_c.double(), similarity_c)
        if self.metric == "euclidean":
            return similarity_c, (others_cH - mine_1H).square().sum(1).sqrt()
        return similarity_c, (2 - 2 * similarity_c).clamp(min=0).sqrt()

    def sure(self, embedding_H: Tensor, distance: float, farthest: float) -> bool:
        """Whether nothing nearer than `distance` lies beyond candidates up to `farthest`."""
        scale = 1.0
        if self._half_N is not None:
            norm = float((embedding_H.double() - self._mean_H).square().sum())
            scale = norm + 2 * float(self._half_N.max())
        return farthest**2 - distance**2 > 2 * _ROUNDING * scale


def _copies(embedding_H: Tensor, others_cH: Tensor) -> Tensor:
    """(c,) bool: the same vector, up to rounding."""
    away_c = (others_cH.double() - embedding_H.double()).square().sum(1).sqrt()
    return away_c <= _ROUNDING * others_cH.double().square().sum(1).sqrt()


def _inverse_spread(embeddings_NH: Tensor, mean_H: Tensor) -> Tensor:
    """(H,) one over the standard deviation of each dimension, 0 where nothing varies."""
    away_NH = embeddings_NH - mean_H.float()
    spread_H = away_NH.square().mean(0, dtype=torch.float64).sqrt()
    varies_H = spread_H > _CONSTANT * spread_H.mean()
    return torch.where(varies_H, 1 / spread_H, 0.0)


def _graph(rows_NH: Tensor, metric: Metric) -> Any:
    try:
        faiss: Any = import_module("faiss")
    except ImportError as problem:
        raise MissingDependencyError(
            "the backend 'faiss' needs faiss: pip install 'expertmix[knn]' (or faiss-cpu), or use "
            "the backend 'exact', which needs nothing"
        ) from problem
    kind = faiss.METRIC_L2 if metric == "euclidean" else faiss.METRIC_INNER_PRODUCT
    graph = faiss.IndexHNSWFlat(rows_NH.shape[1], 32, kind)
    graph.hnsw.efConstruction, graph.hnsw.efSearch = 80, 128
    graph.add(rows_NH.numpy())
    return graph
