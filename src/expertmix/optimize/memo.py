"""What a method learned once from a reference set, kept where the caller can see it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from torch import Tensor

from expertmix.optimize.problem import Problem

Kept = TypeVar("Kept", Tensor, tuple[Tensor, ...])


class Memo(Generic[Kept]):
    """The last thing that was learned, and what it was learned from.

    Sources are compared by what they hold: a model that is opened again, or a reference set that is
    loaded again, teaches nothing new; other weights, references or labels do.
    """

    def __init__(self) -> None:
        self.source: Hashable = None
        self.kept: Kept | None = None

    def get(self, source: Hashable, learn: Callable[[], Kept]) -> Kept:
        """What was learned from this source; learned now if need be."""
        if self.kept is None or source != self.source:
            self.kept, self.source = learn(), source
        return self.kept


def source_of(problem: Problem) -> Hashable:
    """The model, what of it is decided, and the references."""
    pathways = problem.pathways
    opened = pathways.fingerprint(), tuple(pathways.sites), pathways.decisions, pathways.scored
    return *opened, problem.finder.settings.metric, problem.reference.digest
