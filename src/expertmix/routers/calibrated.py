"""Scores that can be compared between adapters: each by its own mean and deviation.

Without it the adapter of the largest norm, or of the highest rank, wins nearly everywhere. Mean and
deviation come from any unlabelled text; this file is given scores and knows no model.

Legend: T tokens, E adapters, m candidates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from expertmix.errors import ConfigError
from expertmix.routers.router import Router
from expertmix.routers.rule import Rule
from expertmix.routers.seen import Seen


@dataclass(frozen=True, eq=False)
class Level:
    """What scores an adapter usually gets at a module.

    Attributes:
        mean: (E,), 0 for adapters that do nothing there.
        deviation: (E,), 1 for adapters that do nothing there, or whose score never changes.
    """

    mean: Tensor
    deviation: Tensor


@dataclass(frozen=True, eq=False)
class Calibrated(Router):
    """Another router's scores in deviations from each adapter's own mean.

    Attributes:
        inner: The router whose scores they are; its rule selects and weighs (its temperature is in
            deviations now).
        levels: Per module what is usual there.
    """

    inner: Router
    levels: Mapping[str, Level] = field(repr=False)

    @property
    def rule(self) -> Rule:
        """The inner router's."""
        return self.inner.rule

    @property
    def whole(self) -> bool:
        """As the inner router."""
        return self.inner.whole

    def check(self, names: Sequence[str], modules: Sequence[str]) -> None:
        """Every module must have a level, of as many adapters as there are."""
        self.inner.check(names, modules)
        for module in modules:
            if module not in self.levels or len(self.levels[module].mean) != len(names):
                raise ConfigError(f"the calibration is not for this shelf at {module!r}; renew it")

    def scores(self, seen: Seen) -> Tensor:
        """(T, E) (score - mean) / deviation."""
        scores_TE = self.inner.scores(seen)
        level = self.levels[seen.module]
        return (scores_TE - level.mean.to(scores_TE)) / level.deviation.to(scores_TE)

    def among(self, seen: Seen, candidates: Tensor) -> Tensor:
        """(T, m) of the same."""
        scores_Tm = self.inner.among(seen, candidates)
        level = self.levels[seen.module]
        mean_Tm, deviation_Tm = (
            value.to(scores_Tm)[candidates] for value in (level.mean, level.deviation)
        )
        return (scores_Tm - mean_Tm) / deviation_Tm


class Spread:
    """Sums of scores from which a level is computed: text after text.

    Attributes:
        count: Tokens that were added.
    """

    def __init__(self, experts: int) -> None:
        self.count = 0
        self._sums = torch.zeros(2, experts, dtype=torch.float64)
        self._counts = torch.zeros(experts, dtype=torch.int64)

    def add(self, scores: Tensor) -> None:
        """Add (T, E) scores; minus infinity is none: an adapter that is idle, or no candidate."""
        scores_TE = scores.detach().double().cpu()
        finite_TE = torch.isfinite(scores_TE)
        scores_TE = torch.where(finite_TE, scores_TE, 0.0)
        self._counts += finite_TE.sum(0)
        self._sums += torch.stack([scores_TE.sum(0), scores_TE.square().sum(0)])
        self.count += len(scores_TE)

    def level(self) -> Level:
        """Mean and deviation of each adapter's scores.

        Raises:
            ConfigError: Fewer than two tokens were read.
        """
        if self.count < 2:
            raise ConfigError("a calibration needs some text: at least two tokens")
        mean, square = self._sums / self._counts.clamp(min=1)
        variance = (square - mean.square()).clamp(min=0)
        steady = variance <= 1e-12 * square
        return Level(mean.float(), torch.where(steady, 1.0, variance.sqrt()).float())
