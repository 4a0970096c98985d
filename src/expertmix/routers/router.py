"""The one interface of all routers: a rule, and a function from what is seen to scores.

Legend: T tokens, E adapters, K selected adapters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from expertmix.errors import ConfigError
from expertmix.routers.directions import Seen
from expertmix.routers.rule import Rule


class Router(ABC):
    """Scores adapters for tokens; subclasses are frozen dataclasses without hidden state."""

    @property
    @abstractmethod
    def rule(self) -> Rule:
        """How its scores become weights."""

    @abstractmethod
    def scores(self, seen: Seen) -> Tensor:
        """(T, E) scores in float32 or better, differentiable where they depend on the input.

        What adapters get that do nothing at the module is ignored.
        """

    def check(self, names: Sequence[str], modules: Sequence[str]) -> None:  # noqa: B027
        """Refuse a shelf that this router cannot route, before anything runs.

        Args:
            names: Of the E adapters.
            modules: Names of the modules that it would route.

        Raises:
            ConfigError: The router names an adapter or module that is not there.
        """

    def decide(self, seen: Seen) -> tuple[Tensor, Tensor]:
        """(T, K) adapters and (T, K) weights, without any intervention."""
        scores_TE = available_scores(self.scores(seen), seen)
        indices_TK = self.rule.select(scores_TE, self.rule.width(seen.directions.count))
        return indices_TK, self.rule.weigh(scores_TE.gather(1, indices_TK))


def available_scores(scores: Tensor, seen: Seen) -> Tensor:
    """(T, E) scores, minus infinity for adapters that do nothing at the module."""
    directions = seen.directions
    if directions.count == len(directions.names):
        return scores
    return scores.masked_fill(~directions.available, float("-inf"))


def known(name: str, names: Sequence[str]) -> int:
    """The number of an adapter.

    Raises:
        ConfigError: The shelf has none of that name.
    """
    if name not in names:
        raise ConfigError(f"no adapter {name!r} on the shelf; it has {', '.join(names)}")
    return list(names).index(name)
