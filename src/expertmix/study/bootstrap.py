"""How sure a mean over texts is: the bootstrap over texts (Efron 1979), percentile intervals.

Texts are drawn with replacement, all of a run's numbers with the same draws, so that differences
between runs on the same texts are paired. Knows no model.

Legend: N texts, R draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from expertmix.core.estimate import Estimate

Sums = NDArray[np.float64]
"""(R + 1,) a sum over texts: of the texts as they are first, then of each draw."""

DRAWS = 2000
_INSIDE = 95  # per cent of the draws


class Draws:
    """Which texts were drawn how often.

    Args:
        texts: N.
        draws: R.
        seed: Of the draws.
    """

    def __init__(self, texts: int, draws: int = DRAWS, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        self._drawn_RN = random.integers(0, texts, (draws, texts)) if texts else None
        self._texts = texts

    def sums(self, *values: Sequence[float]) -> tuple[Sums, ...]:
        """Sums of N values each, of the texts and of each draw."""
        return tuple(self._sum(np.asarray(one, np.float64)) for one in values)

    def _sum(self, values_N: NDArray[np.float64]) -> Sums:
        if self._drawn_RN is None:
            return np.zeros(1)
        drawn: Sums = values_N[self._drawn_RN].sum(1)
        return np.concatenate([[values_N.sum()], drawn])


def ratio(top: Sums, bottom: Sums) -> Sums:
    """Quotients; `nan` where there is nothing to divide by."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(bottom == 0, np.nan, top / bottom)


def estimate(values: Sums, texts: int) -> Estimate:
    """The first value, and where most of the others lie.

    Args:
        values: Of the texts as they are, then of each draw.
        texts: How many there are: of a single one nothing can be drawn.
    """
    drawn = values[1:][np.isfinite(values[1:])]
    if texts < 2 or not len(drawn) or not math.isfinite(values[0]):
        return Estimate(float(values[0]))
    low, high = np.percentile(drawn, [50 - _INSIDE / 2, 50 + _INSIDE / 2])
    return Estimate(float(values[0]), float(low), float(high))
