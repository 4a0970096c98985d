"""A sample on its way through the stages of re-mixing, and what each stage takes.

Legend: O options, D decision tokens, L critical sites, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter

import torch
from torch import Tensor

from expertmix.core.pathway import Mode, Reading
from expertmix.optimize.neighborhood import Neighborhood
from expertmix.optimize.problem import Solution
from expertmix.optimize.samples import Sample, scores

UNREADABLE = "the plain pass is not finite"
NOT_FINITE = "loss is not finite"
NO_NEIGHBORS = "no neighbors"
UNCHANGED = "the method left it alone"


@dataclass(eq=False)
class Item:
    """A sample on its way through the stages."""

    number: int
    sample: Sample
    reading: Reading
    reason: str = ""
    start: Tensor | None = None
    mass: Tensor | None = None
    neighbors: Neighborhood | None = None
    values: Tensor | None = None
    mode: Mode | None = None
    losses: Tensor | None = None
    notes: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.base = scores(self.reading.logprobs[None].cpu(), [self.sample])[0]
        self.dense = self.hard = self.base
        parts = (self.reading.logprobs, self.reading.weights, self.reading.logits)
        self.readable = all(bool(part.isfinite().all()) for part in parts)
        if not self.readable:
            self.reason = UNREADABLE

    @property
    def found(self) -> Tensor:
        """The values of a changed sample."""
        assert self.values is not None
        return self.values

    def take(self, solution: Solution, row: int) -> None:
        """Its part of a solution."""
        self.losses = None if solution.losses is None else solution.losses[:, row].cpu()
        self.notes = {name: _row(value, row) for name, value in solution.notes.items()}
        self.mode = solution.mode
        values = solution.values[row].detach()
        lonely = self.neighbors is None or not bool(self.neighbors.present.any())
        known = solution.reasons[row] if solution.reasons else ""
        finite = torch.ones(1) if self.losses is None else self.losses.isfinite()
        if bool(solution.changed[row]):
            if usable(values) and bool(finite.any()):
                self.values = values
            else:
                self.reason = NOT_FINITE
        elif known or lonely:
            self.reason = known or NO_NEIGHBORS
        else:
            self.reason = UNCHANGED if bool(finite.all()) else NOT_FINITE

    def score(self, dense_O: Tensor, hard_O: Tensor) -> None:
        """Take the new scores, or fall back to the base."""
        count = len(self.sample.question.options)
        self.dense, self.hard = dense_O[:count], hard_O[:count]
        if not bool(self.dense.isfinite().all() and self.hard.isfinite().all()):
            self.values, self.reason = None, NOT_FINITE


class Clock:
    """Seconds per stage, shared evenly by the samples of a batch."""

    def __init__(self, count: int) -> None:
        self._count = count
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time the block."""
        begin = perf_counter()
        yield
        self.seconds[stage] = (perf_counter() - begin) / self._count


def _row(value: object, row: int) -> object:
    """A sample's part of a note."""
    if isinstance(value, Tensor):
        return value[row].detach().cpu() if value.dim() else value.detach().cpu()
    if isinstance(value, list | tuple):
        return value[row]
    return value


def usable(values_DLE: Tensor) -> bool:
    """Whether logits can route: no NaN, nothing infinitely likely, an expert left everywhere."""
    bad = values_DLE.isnan() | torch.isposinf(values_DLE)
    return not bool(bad.any()) and bool(values_DLE.isfinite().any(-1).all())
