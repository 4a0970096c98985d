"""How evenly something is spread over experts: entropy, balance, Gini, specialization.

Pure functions on vectors; they know nothing of traces. Where nothing at all was spread the answer
is `nan`, never a number that looks like a finding.

Legend: E experts, G groups (labels), N rows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def entropy(probabilities: Tensor) -> Tensor:
    """Shannon entropy in nats, H = -Σ p log p, of distributions along the last axis.

    Args:
        probabilities: (..., E), each row summing to 1.

    Returns:
        (...,) nats, at most log E.
    """
    terms: Tensor = torch.special.entr(probabilities)
    return terms.sum(-1)


def shares(amounts: Tensor) -> Tensor:
    """Absolute amounts divided by their sum along the last axis; `nan` where the sum is zero."""
    sizes = amounts.to(torch.float64).abs()
    return sizes / sizes.sum(-1, keepdim=True)


def balance(load_E: Tensor) -> float:
    """Evenness of a load: its entropy divided by log E.

    Args:
        load_E: (E,) calls or mass per expert, not negative.

    Returns:
        1 for a perfectly even load, 0 when one expert takes all, `nan` without any load.
    """
    if len(load_E) == 1:
        return 1.0 if bool(load_E.abs().sum() > 0) else math.nan
    return _unit(float(entropy(shares(load_E))) / math.log(len(load_E)))


def peak(load_E: Tensor) -> float:
    """Load of the busiest expert as a multiple of the mean load: 1 is even, E is the maximum."""
    return float(shares(load_E).max()) * len(load_E)


def gini(mass_E: Tensor) -> float:
    """Centralization of a mass: the Gini coefficient divided by its maximum (n - 1) / n.

    G = 2 Σ i·x₍ᵢ₎ / (n Σ x) - (n + 1) / n over the mass sorted upwards (INFORM, arXiv 2602.04291,
    measures the incoming routing mass so; the division makes systems of different n comparable).

    Args:
        mass_E: (E,) mass per expert; absolute values are taken.

    Returns:
        0 when all experts have the same mass, 1 when one has all, `nan` when there is none.
    """
    count = len(mass_E)
    if count == 1:
        return 0.0 if bool(mass_E.abs().sum() > 0) else math.nan
    rising_E = shares(mass_E).sort().values
    rank_E = torch.arange(1, count + 1, dtype=torch.float64)
    raw = float(2 * (rank_E * rising_E).sum() / count) - (count + 1) / count
    return _unit(raw * count / (count - 1))


def specialization(load_GE: Tensor) -> float:
    """How far the groups use different experts: Jensen-Shannon divergence over its maximum.

    The groups count alike, whatever their size: JS = H(mean_g p_g) - mean_g H(p_g), divided by
    log min(G, E).

    Args:
        load_GE: (G, E) calls or mass per group and expert; groups without load are left out.

    Returns:
        0 when all groups use the experts alike, 1 when each has experts of its own, `nan` with
        fewer than two groups.
    """
    share_GE = shares(load_GE[load_GE.abs().sum(1) > 0])
    most = min(share_GE.shape)
    if most < 2:
        return math.nan
    divergence = entropy(share_GE.mean(0)) - entropy(share_GE).mean()
    return _unit(float(divergence) / math.log(most))


def _unit(value: float) -> float:
    """Rounding errors cut off at 0 and 1; `nan` stays, which min and max would lose."""
    return value if math.isnan(value) else min(1.0, max(0.0, value))
