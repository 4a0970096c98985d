"""How an outcome's pathway moved, in few numbers: `moved`.

Only the experts that are called are kept, as pairs of number and weight, so that a ledger of many
outcomes stays small. Knows no report.

Legend: D decision tokens, L critical sites, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from expertmix.optimize.outcome import Outcome

_DIGITS = 5


def moved(outcome: Outcome, top_k: int) -> dict[str, Any] | None:
    """What a report needs of a pathway, mean over the decision tokens; JSON-ready.

    `before` and `after` hold per site pairs [expert, weight]; `kl` holds per site the divergence
    Σ q log(q / p), in nats, of the new distribution q over all experts from the base's p. Values
    that shift the router are added to the base's logits: at the first critical site that is what
    happens, and behind it the router's own logits differ a little.

    Args:
        outcome: Of any method.
        top_k: Experts that a decision token calls.

    Returns:
        None where nothing was changed.
    """
    if outcome.values is None:
        return None
    start_DLE = outcome.start
    shift = outcome.mode == "add"
    now_DLE = start_DLE + outcome.values if shift else outcome.values.expand_as(start_DLE)
    new_DLE, old_DLE = (logits.double().log_softmax(-1) for logits in (now_DLE, start_DLE))
    away_DLE = torch.where(new_DLE.isfinite(), new_DLE.exp() * (new_DLE - old_DLE), 0.0)
    return {
        "before": _pairs(start_DLE, outcome.mass, top_k),
        "after": _pairs(now_DLE, outcome.mass, top_k),
        "kl": [round(max(0.0, value), 6) for value in away_DLE.sum(-1).mean(0).tolist()],
    }


def _pairs(logits_DLE: Tensor, mass_DL: Tensor, top_k: int) -> list[list[list[float]]]:
    best = logits_DLE.topk(min(top_k, logits_DLE.shape[-1]), dim=-1)
    weights_DLK = best.values.softmax(-1) * mass_DL[..., None]
    dense_LE = torch.zeros_like(logits_DLE).scatter(-1, best.indices, weights_DLK).mean(0)
    return [
        [[number, round(value, _DIGITS)] for number, value in enumerate(row) if value > 0]
        for row in dense_LE.tolist()
    ]
