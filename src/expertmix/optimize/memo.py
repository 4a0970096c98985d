"""What a method learned once from a reference set, kept where the caller can see it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from torch import Tensor

Kept = TypeVar("Kept", Tensor, tuple[Tensor, ...])


class Memo(Generic[Kept]):
    """The last thing that was learned, and the objects it was learned from.

    They are compared by identity and kept alive with it, so nothing that was learned on another
    model or other references is ever given out.
    """

    def __init__(self) -> None:
        self.sources: tuple[object, ...] = ()
        self.kept: Kept | None = None

    def get(self, sources: tuple[object, ...], learn: Callable[[], Kept]) -> Kept:
        """What was learned from these very objects; learned now if need be."""
        same = len(sources) == len(self.sources) and all(
            one is other for one, other in zip(sources, self.sources, strict=True)
        )
        if self.kept is None or not same:
            self.kept, self.sources = learn(), sources
        return self.kept
