"""Losses that keep routers in order. Knows logits; no model.

Legend: B texts, S tokens of each, T = B · S, E experts, K of them per token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def balance_loss(
    logits: Sequence[Tensor], top_k: int, mask_BS: Tensor | None = None, *, scores: str = "softmax"
) -> Tensor:
    """How unevenly experts are called: 1 where they are called evenly.

    Of one router E/K · Σ_i f_i p_i, with f_i the calls of expert i per token and p_i its mean
    probability (Switch, arXiv 2101.03961, eq. 4-6, per call), averaged over all routers: of a
    chain's iterations, too, so that C of them weigh as much as one.

    Args:
        logits: (T, E) of each router that ran.
        top_k: K.
        mask_BS: 1 for tokens that count.
        scores: What routers make of logits; sigmoids are brought to a sum of 1.
    """
    counted_T = None if mask_BS is None else mask_BS.reshape(-1).to(logits[0].device, torch.float32)
    losses = [_balance(one, top_k, counted_T, scores) for one in logits]
    return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()


def _balance(logits_TE: Tensor, top_k: int, counted_T: Tensor | None, scores: str) -> Tensor:
    logits_TE = logits_TE.float()
    if scores == "softmax":
        shares_TE = logits_TE.softmax(-1)
    else:
        scores_TE = logits_TE.sigmoid()
        shares_TE = scores_TE / scores_TE.sum(-1, keepdim=True)
    called_TE = torch.zeros_like(shares_TE)
    called_TE.scatter_(1, shares_TE.topk(top_k, dim=-1).indices, 1.0)
    experts = logits_TE.shape[-1]
    called_E, share_E = _mean(called_TE, counted_T), _mean(shares_TE, counted_T)
    return experts / top_k * (called_E * share_E).sum()


def z_loss(logits: Sequence[Tensor], mask_BS: Tensor | None = None) -> Tensor:
    """Mean squared log-sum-exp of all routers' logits (ST-MoE, arXiv 2202.08906, eq. 5)."""
    counted_T = None if mask_BS is None else mask_BS.reshape(-1).to(logits[0].device, torch.float32)
    found = [_mean(one.float().logsumexp(-1).square()[:, None], counted_T) for one in logits]
    return torch.stack([loss.to(found[0].device) for loss in found]).mean()


def _mean(values_TE: Tensor, counted_T: Tensor | None) -> Tensor:
    if counted_T is None:
        return values_TE.mean(0)
    counted_T = counted_T.to(values_TE.device)
    return (values_TE * counted_T[:, None]).sum(0) / counted_T.sum().clamp(min=1)
