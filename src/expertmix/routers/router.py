"""The one interface of all routers: a rule, and a function from what is seen to scores.

Legend: T tokens, E adapters, K selected adapters, m candidates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from expertmix.errors import ConfigError
from expertmix.routers.memory import Memory, Past
from expertmix.routers.rule import Rule
from expertmix.routers.seen import Seen

MARGIN = 2
"""So many more candidates than are selected are scored exactly, where all are scored roughly."""


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

    @property
    def whole(self) -> bool:
        """Whether its scores need all directions of all adapters."""
        return False

    def among(self, seen: Seen, candidates: Tensor) -> Tensor:
        """(T, m) of the `scores`, those of (T, m) adapters: a whole router scores these alone."""
        return self.scores(seen).gather(1, candidates)

    def ranked(self, seen: Seen) -> Tensor:
        """(T, E) the scores by which it decides; minus infinity for who does nothing here.

        Where a pass is seen roughly first, those who are no candidates have a rough score, never
        above that of a candidate.
        """
        sieved = self._sieved(seen)
        if sieved is None:
            return available_scores(self.scores(seen), seen)
        rough_TE, candidates_Tm, exact_Tm = sieved
        lowest_T1 = exact_Tm.detach().amin(1, keepdim=True)
        return rough_TE.to(exact_Tm.dtype).minimum(lowest_T1).scatter(1, candidates_Tm, exact_Tm)

    def _sieved(self, seen: Seen) -> tuple[Tensor, Tensor, Tensor] | None:
        """Rough scores, the K + MARGIN highest, and their exact scores; None without a sieve."""
        width = self.rule.width(seen.directions.count) + MARGIN
        if seen.rough is None or seen.memory is not None:
            return None  # one with a memory decides by more than this module's scores
        if not seen.directions.apart(len(seen.hidden), width):
            return None  # exact scores of all cost less
        with torch.no_grad():
            rough_TE = available_scores(self.scores(seen.rough), seen)
            candidates_Tm = rough_TE.topk(width, dim=1).indices
        return rough_TE, candidates_Tm, self.among(seen, candidates_Tm)

    @property
    def remembers(self) -> bool:
        """Whether it needs a `memory`."""
        return False

    def memory(self, real: Tensor, past: Past | None) -> Memory | None:
        """What a router needs that looks at more than one module and token: made for every pass.

        Args:
            real: (B, S) bool, False for padding.
            past: What its memory of the tokens before this pass came to, or None for none.
        """
        return None

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
        width = self.rule.width(seen.directions.count)
        sieved = self._sieved(seen)
        if sieved is None:
            scores_TE = available_scores(self.scores(seen), seen)
            indices_TK = self.rule.select(scores_TE, width)
            return indices_TK, self.rule.weigh(scores_TE.gather(1, indices_TK))
        _, candidates_Tm, exact_Tm = sieved
        chosen_TK = self.rule.select(exact_Tm, width)
        weights_TK = self.rule.weigh(exact_Tm.gather(1, chosen_TK))
        return seen.narrowed(candidates_Tm, chosen_TK), weights_TK


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
