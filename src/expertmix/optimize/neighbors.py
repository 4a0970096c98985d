"""Neighbors: the references that are most like a sample, and how much each of them counts.

Hidden states of a language model share a large common part, so plain cosines between them are all
near 1; and a single dimension may hold nearly all of their variance (measured: 96.5 % of that of
the default LM's mean embeddings of 1000 openbook_qa prompts). So by default each dimension is
standardized over the references first. References that repeat the sample
are left out: see `similar`.

Knows embeddings and texts; no model.

Legend: B samples, N references, H embedding width, k neighbors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args
from zlib import crc32

import torch
from torch import Tensor

from expertmix.errors import ConfigError
from expertmix.optimize.kernels import Kernel, kernel_of, weigh
from expertmix.optimize.neighborhood import Neighborhood
from expertmix.optimize.reference import ReferenceSet
from expertmix.optimize.samples import Sample
from expertmix.optimize.search import Backend, Index, Metric
from expertmix.optimize.similar import Duplicates

_SLACK = 13  # candidates beyond k that are looked at first
Order = Literal["nearest", "random"]


@dataclass(frozen=True, slots=True)
class Neighbors:
    """Which references are neighbors.

    Attributes:
        k: At most so many; 0 means none, and the base is left alone.
        radius: All within this distance instead (an ε-ball), at most `most`; `k` is not used then.
        most: See `radius`.
        kernel: `gaussian`, `matern` (ν = 3/2; also `matern12`, `matern32`, `matern52`),
            `polynomial`, `linear`, or a kernel of `kernels`.
        bandwidth: Of `gaussian` and `matern`; None is the median rule.
        metric: `standardized cosine`: each dimension less its mean over the references, in units
            of its standard deviation there; `centered cosine`: less its mean; plain `cosine`; or
            `euclidean`. Distances of cosines s are √(2 − 2s), that is Euclidean on the unit sphere.
            Similarities of `euclidean` are standardized cosines.
        max_similarity: References that are more similar than this are left out as near-duplicates;
            None keeps them.
        ngram: Words of an n-gram; None compares no texts.
        max_overlap: Containment of n-grams from which on a reference is left out, see `similar`.
        order: `nearest`, or `random`: a control, with references drawn evenly for each sample.
        seed: Of `random`.
        backend: `exact` (a matrix product) or `faiss` (approximate, for very large sets).

    Raises:
        ConfigError: An impossible setting.
    """

    k: int = 3
    radius: float | None = None
    most: int = 64
    kernel: str | Kernel = "gaussian"
    bandwidth: float | None = None
    metric: Metric = "standardized cosine"
    max_similarity: float | None = 0.95
    ngram: int | None = 8
    max_overlap: float = 0.5
    order: Order = "nearest"
    seed: int = 0
    backend: Backend = "exact"

    def __post_init__(self) -> None:
        kernel_of(self.kernel, self.bandwidth)
        for key, kind in (("metric", Metric), ("order", Order), ("backend", Backend)):
            if getattr(self, key) not in get_args(kind):
                raise ConfigError(
                    f"{key}={getattr(self, key)!r} is none of {', '.join(get_args(kind))}"
                )
        for key, least in (("k", 0), ("radius", 0), ("most", 1), ("ngram", 1)):
            value = getattr(self, key)
            if value is not None and not value >= least:
                raise ConfigError(f"{key}={value}: it must be at least {least}")
        if self.order == "random" and self.radius is not None:
            raise ConfigError("random neighbors are a number of them: use k, not radius")
        if not 0 < self.max_overlap <= 1:
            raise ConfigError(f"max_overlap={self.max_overlap}: it is a share, above 0 and up to 1")

    @property
    def limit(self) -> int:
        """How many neighbors a sample has at most."""
        return self.k if self.radius is None else self.most

    def random(self, seed: int) -> Neighbors:
        """The control: as many neighbors, anywhere."""
        return replace(self, order="random", seed=seed)

    def nearest_one(self) -> Neighbors:
        """For the distance to the nearest reference, texts not compared."""
        return replace(self, k=1, radius=None, order="nearest", ngram=None)


NEAREST = Neighbors()


class Finder:
    """A reference set, ready to be searched many times.

    Args:
        reference: The set.
        settings: Which references are neighbors.
        index: Of the same references with the same metric and backend, if there is one.

    Raises:
        MissingDependencyError: faiss is asked for and not installed.
    """

    def __init__(
        self,
        reference: ReferenceSet,
        settings: Neighbors = NEAREST,
        index: Index | None = None,
    ) -> None:
        self.reference, self.settings = reference, settings
        if index is None:
            index = Index(reference.embeddings, settings.metric, settings.backend)
        self.index = index
        self._duplicates = (
            None
            if settings.ngram is None
            else Duplicates(reference.samples, settings.ngram, settings.max_overlap)
        )

    def repeats(self, embeddings_BH: Tensor, samples: Sequence[Sample]) -> Tensor:
        """(B, N) bool: the references that are left out as near-duplicates of samples."""
        found_BN = torch.zeros(len(samples), len(self.reference), dtype=torch.bool)
        if not len(self.reference):
            return found_BN
        if self.settings.max_similarity is not None:
            found_BN |= self.index.similarities(embeddings_BH) > self.settings.max_similarity
        if self._duplicates is not None:
            for row, sample in enumerate(samples):
                found_BN[row, self._duplicates.all_of(sample)] = True
        return found_BN

    def find(
        self,
        embeddings_BH: Tensor,
        samples: Sequence[Sample] = (),
        *,
        without: Sequence[int] = (),
    ) -> Neighborhood:
        """Neighbors of samples.

        A sample's neighbors do not depend on the others. Equally near references come in the order
        of their numbers. A sample whose embedding is not finite has none.

        Args:
            embeddings_BH: (B, H) as `ReferenceSet.embed` made them.
            samples: B of them, to compare texts and to draw at random; may be left out where
                neither is asked for.
            without: Per sample, the number of a reference that is not looked at: itself.

        Raises:
            ConfigError: Embeddings of another width, or samples that are missing.
        """
        self._check(embeddings_BH, samples)
        rows = [
            _Row(
                row, embedding_H, samples[row] if samples else None, without[row] if without else -1
            )
            for row, embedding_H in enumerate(embeddings_BH)
        ]
        waiting = [row for row in rows if self._limit and bool(row.embedding.isfinite().all())]
        count = self._limit + _SLACK
        while waiting:
            found = self._candidates(waiting, count)
            waiting = [
                row for row, numbers in zip(waiting, found, strict=True)
                if not self._settle(row, numbers)
            ]  # fmt: skip
            count *= 4
        return self._joined(rows, embeddings_BH)

    @property
    def _limit(self) -> int:
        return self.settings.limit if len(self.reference) else 0

    def _candidates(self, rows: Sequence[_Row], count: int) -> list[Tensor]:
        if self.settings.order == "random":
            return [self._drawn(row)[:count] for row in rows]
        return self.index.candidates(torch.stack([row.embedding for row in rows]), count)

    def _drawn(self, row: _Row) -> Tensor:
        """All references in an order that the seed and the sample's prompt decide."""
        assert row.sample is not None
        mixed = crc32(repr((self.settings.seed, row.sample.question.prompt)).encode())
        generator = torch.Generator().manual_seed(mixed)  # of a seed it takes 32 bits only
        return torch.randperm(len(self.reference), generator=generator)

    def _settle(self, row: _Row, numbers_c: Tensor) -> bool:
        """Choose a row's neighbors among its candidates; whether no others are needed."""
        random = self.settings.order == "random"
        similarity_c, distance_c = self.index.compare(row.embedding, numbers_c)
        ranked = list(
            zip(distance_c.tolist(), numbers_c.tolist(), similarity_c.tolist(), strict=True)
        )
        all_seen = len(ranked) == len(self.reference)
        farthest = max(distance_c.tolist(), default=0.0)
        if not random:
            ranked.sort()
        row.chosen, row.dropped = [], 0
        for one in ranked:
            if self.settings.radius is not None and one[0] > self.settings.radius:
                return all_seen or self.index.sure(row.embedding, self.settings.radius, farthest)
            if self._left_out(row, one[1], one[2]):
                continue
            row.chosen.append(one)
            if len(row.chosen) == self._limit:
                return all_seen or random or self.index.sure(row.embedding, one[0], farthest)
        return all_seen

    def _left_out(self, row: _Row, number: int, similarity: float) -> bool:
        """Whether a reference is the sample itself, or (counted) a near-duplicate of it."""
        if number == row.without:
            return True
        limit = self.settings.max_similarity
        near = limit is not None and similarity > limit
        if not near and self._duplicates is not None and row.sample is not None:
            near = self._duplicates.found(row.sample, number)
        row.dropped += near
        return near

    def _joined(self, rows: Sequence[_Row], query_BH: Tensor) -> Neighborhood:
        wide = self.settings.limit
        if self.settings.radius is not None:
            wide = max((len(row.chosen) for row in rows), default=0)
        shape = (len(rows), wide)
        indices = torch.full(shape, -1, dtype=torch.int64)
        similarity, distance = torch.zeros(shape), torch.full(shape, torch.inf)
        for row in rows:
            for slot, (far, number, near) in enumerate(sorted(row.chosen)):
                indices[row.row, slot] = number
                similarity[row.row, slot], distance[row.row, slot] = near, far
        kernel = kernel_of(self.settings.kernel, self.settings.bandwidth)
        weights = weigh(kernel, distance, similarity, indices >= 0) if wide else similarity
        dropped = torch.tensor([row.dropped for row in rows], dtype=torch.int64)
        return Neighborhood(indices, similarity, distance, weights, dropped, query_BH)

    def _check(self, embeddings_BH: Tensor, samples: Sequence[Sample]) -> None:
        width = self.reference.embeddings.shape[1]
        if embeddings_BH.dim() != 2 or embeddings_BH.shape[1] != width:
            raise ConfigError(
                f"the references' embeddings have width {width}, the samples' are "
                f"{tuple(embeddings_BH.shape)}: use the same embedding"
            )
        if len(samples) not in (0, len(embeddings_BH)):
            raise ConfigError(f"{len(embeddings_BH)} embeddings for {len(samples)} samples")
        if not samples and self.settings.order == "random":
            raise ConfigError("random neighbors are drawn for a sample: pass the samples")


@dataclass(eq=False, slots=True)
class _Row:
    """A sample while its neighbors are looked for."""

    row: int
    embedding: Tensor
    sample: Sample | None
    without: int
    chosen: list[tuple[float, int, float]] = field(default_factory=list)
    dropped: int = 0


def find(
    embeddings_BH: Tensor,
    reference: ReferenceSet,
    settings: Neighbors = NEAREST,
    samples: Sequence[Sample] = (),
) -> Neighborhood:
    """Neighbors of samples in one call; see `Finder`, which is ready for many."""
    return Finder(reference, settings).find(embeddings_BH, samples)
