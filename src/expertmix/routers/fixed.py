"""One adapter, or given weights, for every token: no routing at all."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expertmix.errors import ConfigError
from expertmix.routers.router import Router, known
from expertmix.routers.rule import Rule, is_number
from expertmix.routers.seen import Seen


@dataclass(frozen=True)
class Fixed(Router):
    """The same weights everywhere.

    Attributes:
        weights: A name, or weight by name (or pairs of both); weights above zero. They need not
            add up to one. Where a named adapter does nothing, its weight is zero.

    Raises:
        ConfigError: No weight, or one that is not above zero.
    """

    weights: tuple[tuple[str, float], ...]

    def __init__(self, weights: str | Mapping[str, float] | Sequence[tuple[str, float]]) -> None:
        object.__setattr__(self, "weights", _pairs(weights))

    @property
    def rule(self) -> Rule:
        """The weights as they are."""
        return Rule(len(self.weights), "given")

    def check(self, names: Sequence[str], modules: Sequence[str]) -> None:
        """Every name must be on the shelf."""
        for name, _ in self.weights:
            known(name, names)

    def scores(self, seen: Seen) -> Tensor:
        """(T, E) logarithms of the weights."""
        names = seen.directions.names
        logs_E = torch.full((len(names),), float("-inf"))
        for name, weight in self.weights:
            logs_E[known(name, names)] = math.log(weight)
        return logs_E.to(seen.hidden.device).expand(len(seen.hidden), -1)


def _listed(weights: Any) -> list[Any]:
    given = weights.items() if isinstance(weights, Mapping) else weights
    found = list(given) if isinstance(given, Iterable) else [given]
    if not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in found):
        raise ConfigError(f"Fixed needs the name of an adapter, or weights by name: {weights!r}")
    return found


def _pairs(weights: Any) -> tuple[tuple[str, float], ...]:
    if isinstance(weights, str):
        weights = {weights: 1.0}
    pairs = _listed(weights)
    if not pairs:
        raise ConfigError("Fixed needs the name of an adapter, or weights by name")
    for name, weight in pairs:
        if not (is_number(weight) and 0 < weight < math.inf):
            raise ConfigError(f"the weight of {name!r} must be above zero and finite: {weight!r}")
    if len({name for name, _ in pairs}) < len(pairs):
        raise ConfigError("Fixed names an adapter twice")
    return tuple((str(name), float(weight)) for name, weight in pairs)
