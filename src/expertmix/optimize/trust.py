"""A trust region: how far a pathway may leave the base's, measured where the router decides.

Knows two pathways; not what is gained by moving.

Legend: B samples, D decision tokens, L sites, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from expertmix.core.pathway import Mode

_BISECTIONS = 30


def routing(values_BDLE: Tensor, start_BDLE: Tensor, mode: Mode) -> Tensor:
    """(B, D, L, E) log-probabilities that a pathway routes by, dense over its experts.

    Args:
        values_BDLE: (B, D or 1, L, E) the pathway.
        start_BDLE: (B, D, L, E) the base's logits, which mode `add` shifts.
        mode: Of the pathway.
    """
    logits_BDLE = start_BDLE + values_BDLE if mode == "add" else values_BDLE
    return logits_BDLE.log_softmax(-1)


def divergence(values_BDLE: Tensor, start_BDLE: Tensor, mode: Mode = "set") -> Tensor:
    """(B,) KL(new ‖ base) in nats, the mean over decision tokens and sites.

    The base's distribution is taken over the experts that the pathway leaves in (its core), so a
    pathway that has not moved has divergence 0.
    """
    new = routing(values_BDLE, start_BDLE, mode)
    kept = start_BDLE.where(new.isfinite(), float("-inf"))
    base = kept.log_softmax(-1)
    each = torch.where(new.isfinite(), new.exp() * (new - base), 0.0)
    return each.sum(-1).mean((1, 2)).clamp(min=0)


def project(values_BDLE: Tensor, start_BDLE: Tensor, limit: float, mode: Mode = "set") -> Tensor:
    """Pathways within the trust region, on the straight line to where they started.

    ω' = s + t(ω − s) with the largest t ≤ 1 for which KL(ω' ‖ s) ≤ limit. Along a line of logits
    the divergence from the line's start grows (its slope is t times a variance), so bisection finds
    t; the lower end is taken, so the limit holds exactly.

    Args:
        values_BDLE: (B, D or 1, L, E) pathways.
        start_BDLE: (B, D, L, E) the base's logits.
        limit: Nats.
        mode: Of the pathways.
    """
    origin = torch.zeros_like(values_BDLE) if mode == "add" else start_BDLE
    way = torch.where(values_BDLE.isfinite(), values_BDLE - origin, 0.0)

    def at(part_B: Tensor) -> Tensor:
        moved = origin + part_B.view(-1, 1, 1, 1) * way
        return moved.where(values_BDLE.isfinite(), values_BDLE)

    far = divergence(values_BDLE, start_BDLE, mode) > limit
    low, high = torch.zeros(len(far)).to(way), torch.ones(len(far)).to(way)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        inside = divergence(at(middle), start_BDLE, mode) <= limit
        low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
    return torch.where(far.view(-1, 1, 1, 1), at(low), values_BDLE)
