"""How the fields of interventions are read: whole numbers, tables of booleans, tensors too."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from expertmix.errors import ConfigError


@runtime_checkable
class SupportsToList(Protocol):
    """A tensor, or an array of NumPy."""

    def tolist(self) -> Any:
        """The values as Python numbers."""


def optional_integers(values: Any) -> tuple[int, ...] | None:
    """As `integers`; None stays None."""
    return None if values is None else integers(values)


def integers(values: Any) -> tuple[int, ...]:
    """One whole number or many; tensors and arrays too.

    Raises:
        ConfigError: Something else.
    """
    plain = values.tolist() if isinstance(values, SupportsToList) else values
    try:
        numbers = [plain] if isinstance(plain, int) else list(plain)
    except TypeError:
        numbers = [None]
    if not all(isinstance(value, int) and not isinstance(value, bool) for value in numbers):
        raise ConfigError(f"expected whole numbers, got {values!r}")
    return tuple(numbers)


def optional_table(mask: Any) -> tuple[tuple[bool, ...], ...] | None:
    """Rows of booleans; None stays None.

    Raises:
        ConfigError: No rows and columns.
    """
    if mask is None:
        return None
    rows = mask.tolist() if isinstance(mask, SupportsToList) else mask
    try:
        return tuple(tuple(bool(cell) for cell in row) for row in rows)
    except TypeError as problem:
        raise ConfigError("mask must have rows and columns: mask[row][position]") from problem


def vector(values: Iterable[int], like: Tensor) -> Tensor:
    """Whole numbers as int64 on the device of another tensor."""
    return torch.tensor(list(values), dtype=torch.int64, device=like.device)


def listed(value: Any) -> Any:
    """Tuples as lists, at any depth: JSON-ready."""
    return [listed(item) for item in value] if isinstance(value, tuple) else value


def freeze(instance: object, name: str, value: object) -> None:
    """Set a field of a frozen dataclass, while it is being made."""
    object.__setattr__(instance, name, value)
