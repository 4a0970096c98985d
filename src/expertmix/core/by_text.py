"""How sure a ratio is when tokens of a text are alike: sums by group of texts, and `ratios`.

Tokens of one text are no independent draws, texts are. So sums are kept per text (of very many, per
group of texts, which are independent too; this keeps memory flat), and the interval of a ratio of
sums comes from how the groups differ: the linearized cluster variance of Cochran (Sampling
Techniques, 1977, ch. 6.4) with the quantile of Student's t. Knows no trace and no model.

Legend: G groups of texts, X ratios, N tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from expertmix.core.estimate import Estimate

GROUPS = 256
"""Sums are kept for so many groups of texts; up to so many texts, a group is a text."""

FEWEST = 6
"""Groups without which there is no interval: five that agree do so by chance in 1 of 16 cases."""


def group_of(sample_N: Tensor) -> Tensor:
    """(N,) group of each token, by the number of its text."""
    return sample_N % GROUPS


def add_to_groups(sums_G: Tensor, group_N: Tensor, values_N: Tensor) -> None:
    """Add values to the sums of their groups, in place."""
    sums_G += torch.bincount(group_N, values_N.to(torch.float64), minlength=len(sums_G))


def ratios(top_GX: Tensor, bottom_GX: Tensor) -> tuple[Estimate, ...]:
    """Σ top / Σ bottom, X times, each with its 95 % interval.

    Args:
        top_GX: (G, X) sums.
        bottom_GX: (G, X) sums, not negative; groups where it is zero do not count.

    Returns:
        X estimates: nan where there is nothing to divide by, without an interval where fewer than
        `FEWEST` groups count.
    """
    top_GX, bottom_GX = top_GX.to(torch.float64), bottom_GX.to(torch.float64)
    whole_X = bottom_GX.sum(0)
    value_X = top_GX.sum(0) / whole_X  # 0 / 0 is nan, as wanted
    groups_X = (bottom_GX > 0).sum(0)
    rest_GX = (top_GX - value_X * bottom_GX).masked_fill(bottom_GX <= 0, 0)
    spread_X = groups_X / (groups_X - 1) * rest_GX.square().sum(0)
    error_X = spread_X.sqrt() / whole_X
    found = zip(value_X.tolist(), error_X.tolist(), groups_X.tolist(), strict=True)
    return tuple(_estimate(*one) for one in found)


def ratio(top_G: Tensor, bottom_G: Tensor) -> Estimate:
    """One ratio of (G,) sums."""
    return ratios(top_G[:, None], bottom_G[:, None])[0]


def _estimate(value: float, error: float, groups: int) -> Estimate:
    if groups < FEWEST or not math.isfinite(error):
        return Estimate(value)
    reach = _student(groups - 1) * error
    return Estimate(value, value - reach, value + reach)


def _student(freedom: int) -> float:
    """Quantile 0.975 of Student's t, by its expansion (Abramowitz and Stegun, 26.7.5).

    Off by less than 0.005 from five degrees of freedom on.
    """
    z = 1.959963984540054
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + math.fsum(term / float(freedom) ** power for power, term in enumerate(terms, 1))
