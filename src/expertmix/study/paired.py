"""Two runs on the same items: who gained what, and whether that can be chance.

McNemar's exact test (1947; exact: a binomial of the items on which the runs differ), Wilson's
interval (1927) of a share, Holm's correction (1979) for several comparisons, and the paired
bootstrap of a mean difference. Knows no model. Everything is exact or by counting: no
approximation by the normal distribution but Wilson's own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb

from expertmix.core.estimate import Estimate
from expertmix.errors import ConfigError
from expertmix.study.bootstrap import DRAWS, Draws, estimate

_Z95 = 1.959963984540054  # the normal distribution's quantile at 97.5 %


@dataclass(frozen=True, slots=True)
class Flips:
    """How items moved between two runs.

    Attributes:
        both: Right in both.
        gained: Wrong before, right after.
        lost: Right before, wrong after.
        neither: Wrong in both.
    """

    both: int
    gained: int
    lost: int
    neither: int

    @property
    def p(self) -> float:
        """McNemar's exact p-value."""
        return mcnemar(self.gained, self.lost)


def flips(before: Sequence[bool], after: Sequence[bool]) -> Flips:
    """Count how items moved.

    Raises:
        ConfigError: Not the same number of items.
    """
    _check_pairs(before, after)
    pairs = [(bool(a), bool(b)) for a, b in zip(before, after, strict=True)]
    return Flips(
        pairs.count((True, True)), pairs.count((False, True)), pairs.count((True, False)),
        pairs.count((False, False)),
    )  # fmt: skip


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided p-value of McNemar's test.

    Under the null, each of the n = gained + lost items that differ goes either way with 1/2:
    p = min(1, 2 Σ_{i ≤ min(gained, lost)} C(n, i) / 2ⁿ). Without any such item it is 1.

    Raises:
        ConfigError: A negative count.
    """
    if min(gained, lost) < 0:
        raise ConfigError(f"McNemar's test needs counts, not {gained} and {lost}")
    n = gained + lost
    tail = sum(comb(n, i) for i in range(min(gained, lost) + 1))
    return min(1.0, float(2 * tail / (1 << n)))


def wilson(right: int, total: int, z: float = _Z95) -> Estimate:
    """Share of right items with Wilson's score interval.

    Its ends are the shares π at which |p − π| = z √(π (1 − π) / n), so that, unlike p ± z s, they
    never leave [0, 1] and are no single point when all items are right.

    Raises:
        ConfigError: More right items than there are.
    """
    if not 0 <= right <= total:
        raise ConfigError(f"{right} of {total} items cannot be right")
    if not total:
        return Estimate(math.nan)
    share, zz = right / total, z * z / total
    middle = (share + zz / 2) / (1 + zz)
    half = z / (1 + zz) * math.sqrt(share * (1 - share) / total + zz / (4 * total))
    low = 0.0 if right == 0 else max(0.0, middle - half)
    high = 1.0 if right == total else min(1.0, middle + half)
    return Estimate(share, low, high)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down adjusted p-values, by name.

    The i-th smallest of m is multiplied by m − i + 1; none is smaller than one before it, none
    larger than 1. Comparing each with 5 % keeps the chance of any false find below 5 %.
    """
    adjusted: dict[str, float] = {}
    largest = 0.0
    for place, name in enumerate(sorted(p_values, key=lambda one: p_values[one])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def mean_difference(
    before: Sequence[float], after: Sequence[float], *, draws: int = DRAWS, seed: int = 0
) -> Estimate:
    """Mean of after − before over items, with the paired bootstrap's 95 % interval.

    Raises:
        ConfigError: Not the same number of items.
    """
    _check_pairs(before, after)
    changes = [b - a for a, b in zip(before, after, strict=True)]
    if not changes:
        return Estimate(math.nan)
    (sums,) = Draws(len(changes), draws, seed).sums(changes)
    return estimate(sums / len(changes), len(changes))


def _check_pairs(before: Sequence[object], after: Sequence[object]) -> None:
    if len(before) != len(after):
        raise ConfigError(
            f"{len(before)} items before and {len(after)} after cannot be paired: run both on the "
            f"same items"
        )
