"""Problems for tests of methods, in either world, with neighbors as a test wants them.

References are plain lists here: laws of a method are not laws of how references are kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from expertmix.core.pathway import Pathways, Reading
from expertmix.optimize.neighbors import Finder, Neighbors
from expertmix.optimize.problem import Problem
from expertmix.optimize.samples import Sample
from expertmix.optimize.start import start


@dataclass(frozen=True, eq=False)
class Listed:
    """What methods use of a reference set."""

    samples: Sequence[Sample]
    readings: Sequence[Reading]
    start: Tensor
    mass: Tensor
    embeddings: Tensor

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def digest(self) -> str:
        """Of what methods learn from."""
        return repr([self.samples, self.embeddings.tolist(), self.start.tolist()])

    def state(self, index: int) -> Mapping[str, Tensor]:
        """What reading a reference left."""
        return self.readings[index].state

    def prefetch(self, numbers: Iterable[int]) -> None:
        """They are here."""


@dataclass(frozen=True, eq=False)
class Hood:
    """What methods use of a neighborhood."""

    indices: Tensor
    weights: Tensor
    query: Tensor


def problem_of(
    pathways: Pathways,
    samples: Sequence[Sample],
    references: Sequence[Sample],
    indices: Sequence[Sequence[int]] | None = None,
    weights: Sequence[Sequence[float]] | None = None,
    settings: Neighbors = Neighbors(),  # noqa: B008  frozen
) -> Problem:
    """A problem; by default every reference is a neighbor of every sample, all alike."""
    readings = pathways.read([one.question for one in samples])
    begin, mass = start(readings, pathways.sites)
    listed = _listed(pathways, references, begin)
    if indices is None:
        indices = [range(len(references))] * len(samples)
    found = torch.tensor([list(row) for row in indices], dtype=torch.int64).view(len(samples), -1)
    share = (found >= 0).double() if weights is None else torch.tensor(weights).double()
    share = share / share.sum(1, keepdim=True).clamp(min=1e-12)
    dtype = getattr(pathways, "dtype", torch.float32)
    query = torch.stack([reading.mean for reading in readings]).float()
    neighbors: Any = Hood(found, share.float(), query)
    kept: Any = listed
    return Problem(
        pathways, samples, readings, begin.to(dtype), mass.to(dtype), neighbors,
        Finder(kept, settings),
    )  # fmt: skip


def _listed(pathways: Pathways, references: Sequence[Sample], like: Tensor) -> Listed:
    if not references:
        none = like[:0]
        return Listed([], [], none, none[..., 0], torch.zeros(0, 8))
    readings = pathways.read([one.question for one in references])
    begin, mass = start(readings, pathways.sites)
    embeddings = torch.stack([reading.mean for reading in readings]).float()
    return Listed(references, readings, begin, mass, embeddings)


def only(problem: Problem, row: int) -> Problem:
    """The same problem, of one of its samples."""
    part = slice(row, row + 1)
    near = problem.neighbors
    neighbors: Any = Hood(near.indices[part], near.weights[part], near.query[part])
    return replace(
        problem,
        samples=problem.samples[part],
        readings=problem.readings[part],
        start=problem.start[part],
        mass=problem.mass[part],
        neighbors=neighbors,
    )


def reordered(problem: Problem, order: Sequence[int]) -> Problem:
    """The same problem, its neighbors in another order."""
    index = list(order)
    near = problem.neighbors
    neighbors: Any = Hood(near.indices[:, index], near.weights[:, index], near.query)
    return replace(problem, neighbors=neighbors)
