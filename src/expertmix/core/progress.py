"""How long work says how far it is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with (stage in words, steps done, steps in all)."""


def quiet(stage: str, done: int, total: int) -> None:
    """The progress callback that says nothing."""
