"""How the losses of several neighbors become one: mean, trimmed mean, median, all weighted.

Knows numbers and weights; not what they measure. A poisoned reference pulls a mean as far as it
likes, a median not at all as long as it holds less than half of the weight.

Legend: k neighbors, always the last axis.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from expertmix.errors import ConfigError

Aggregate = Literal["mean", "trimmed", "median"]
_ROUNDING = 1e-6  # of a float32 loss, relative
_HALF = 0.5 - 1e-6  # a median is what is left when all but the middle is trimmed


def influence(values_k: Tensor, weights_k: Tensor, aggregate: Aggregate, trim: float) -> Tensor:
    """(…, k) shares that values have in their aggregate; they sum to 1, or are 0 without weight.

    Sorted by value, the weights tile the interval from 0 to 1. A mean takes all of it, a trimmed
    mean leaves `trim` away at both ends, a median takes the middle: the lower and the upper one
    where the middle is a border.

    Args:
        values_k: (…, k).
        weights_k: (…, k), not negative; a value without weight has no share.
        aggregate: One of `Aggregate`.
        trim: Share of the weight that a trimmed mean leaves away at each end, below 0.5.
    """
    weights_k = weights_k.double().expand_as(values_k)
    total = weights_k.sum(-1, keepdim=True)
    weights_k = torch.where(total > 0, weights_k / total, 0.0)
    if aggregate == "mean":
        return weights_k.to(values_k)
    cut = trim if aggregate == "trimmed" else _HALF
    order_k = values_k.detach().argsort(dim=-1, stable=True)
    sorted_k = weights_k.gather(-1, order_k)
    end_k = sorted_k.cumsum(-1)
    inside_k = (end_k.clamp(max=1 - cut) - (end_k - sorted_k).clamp(min=cut)).clamp(min=0)
    kept = inside_k.sum(-1, keepdim=True)
    inside_k = torch.where(kept > 0, inside_k / kept, 0.0)
    return torch.zeros_like(inside_k).scatter(-1, order_k, inside_k).to(values_k)


def joined(values_k: Tensor, shares_k: Tensor) -> Tensor:
    """(…) sums of values times shares; a value without share counts nothing, even if infinite."""
    return torch.where(shares_k > 0, values_k * shares_k, 0.0).sum(-1)


def earliest_best(losses: Tensor, dim: int = 0) -> Tensor:
    """Where along a dimension the least loss is first reached, up to rounding.

    So what is as good as what comes before it is not preferred by the last bit of a sum, which
    depends on the batch. NaN counts as infinite.
    """
    losses = losses.nan_to_num(nan=torch.inf)
    least = losses.amin(dim, keepdim=True)
    return (losses <= least + _ROUNDING * least.abs()).to(torch.uint8).argmax(dim)


def check_aggregate(aggregate: str, trim: float) -> None:
    """Whether these settings are possible.

    Raises:
        ConfigError: They are not.
    """
    if aggregate not in get_args(Aggregate):
        raise ConfigError(f"aggregate {aggregate!r} is none of {', '.join(get_args(Aggregate))}")
    if not 0 <= trim < 0.5:
        raise ConfigError(f"trim={trim}: a share between 0 and 0.5 can be left away at each end")
