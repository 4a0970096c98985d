"""The base's own pathway, as logits: where every optimizer starts.

A pathway's weights are `mass · softmax(values)` over its top K. Routers get their weights in many
ways: a softmax before or after the top-k, a sigmoid, a selection with a bias or by groups, a mixer
that masks. So the chosen experts' values are taken from their weights, `log(weight / mass)`, and
repeat the base whatever its rule. The others have no weight; their values follow the gate's logits
through the link that explains the chosen ones best: the identity (softmax) or log-sigmoid. An
expert with more score than a chosen one, which a bias or a group kept out, is put just below.

Knows logits and weights; no model.

Legend: B questions, D decision tokens, L sites, E experts, K selected ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from expertmix.core.pathway import Reading
from expertmix.core.site import SiteInfo
from expertmix.errors import ConfigError, UnsupportedModelError

_FAINT = 1e-9  # share of the mass that a chosen expert without weight gets
_BELOW = 1e-4  # how far an expert that was not chosen stays below those that were
_TIE = 1e-5  # the identity is preferred where both links explain the weights as well as this


def start(
    readings: Sequence[Reading], infos: Sequence[SiteInfo], *, decisions: int | None = None
) -> tuple[Tensor, Tensor]:
    """The base's pathway: of each token alone, so a batch changes nothing.

    For chosen experts S, `softmax(values[S]) · mass` are the recorded weights, and S are the top K
    of the values. The others get `link(logit) + c`, where c is the mean of `value − link(logit)`
    over S, and at most the least value of S − 1e-4.

    Args:
        readings: B of them. A prompt with fewer tokens than D repeats its first one in front.
        infos: The L critical sites.
        decisions: D; by default that of the longest reading.

    Returns:
        (B, D, L, E) float32 logits and (B, D, L) float32 sums of the weights. A token whose router
        gave no finite weights has NaN.

    Raises:
        ConfigError: No readings, or readings of other sites.
        UnsupportedModelError: A router that gives negative weights, or none at all: no softmax
            can repeat them.
    """
    if not readings:
        raise ConfigError("no readings: there is no pathway to start from")
    depth = decisions or max(len(reading.logits) for reading in readings)
    logits_BDLE = _stack([reading.logits for reading in readings], depth).double()
    indices_BDLK = _stack([reading.indices for reading in readings], depth).long()
    weights_BDLK = _stack([reading.weights for reading in readings], depth).double()
    _check_sites(logits_BDLE, infos)
    mass_BDL = weights_BDLK.sum(-1)
    _check_weights(weights_BDLK, mass_BDL, infos)
    values_BDLE = _values(logits_BDLE, indices_BDLK, weights_BDLK / mass_BDL[..., None])
    return values_BDLE.float(), mass_BDL.float()


def _stack(rows: Sequence[Tensor], depth: int) -> Tensor:
    """(B, D, …), each of D tokens: the last ones, the first repeated where there are fewer."""
    picked = [row[max(0, len(row) - depth) :] for row in rows]
    return torch.stack([torch.cat([row[:1]] * (depth - len(row)) + [row]) for row in picked])


def _values(logits_BDLE: Tensor, indices_BDLK: Tensor, shares_BDLK: Tensor) -> Tensor:
    slots_BDLK = indices_BDLK.clamp(min=0)
    present_BDLK = indices_BDLK >= 0
    inside_BDLK = shares_BDLK.clamp(min=_FAINT).log()
    chosen_BDLE = _scattered(present_BDLK.double(), slots_BDLK, logits_BDLE) > 0
    linked_BDLE = _link(logits_BDLE, slots_BDLK, inside_BDLK, present_BDLK)
    least_BDL1 = inside_BDLK.masked_fill(~present_BDLK, torch.inf).amin(-1, keepdim=True)
    short_BDL1 = (~present_BDLK).any(-1, keepdim=True)  # free slots would call the next best ones
    least_BDL1 = torch.where(
        short_BDL1, least_BDL1.clamp(max=torch.tensor(_FAINT).log()), least_BDL1
    )
    outside_BDLE = linked_BDLE.minimum(least_BDL1 - _BELOW)
    faint_BDLK = inside_BDLK.where(present_BDLK, 0)
    return torch.where(chosen_BDLE, _scattered(faint_BDLK, slots_BDLK, logits_BDLE), outside_BDLE)


def _scattered(values_BDLK: Tensor, slots_BDLK: Tensor, like_BDLE: Tensor) -> Tensor:
    """(B, D, L, E): values at their experts, 0 elsewhere; free slots hold 0 and add nothing."""
    return torch.zeros_like(like_BDLE).scatter_add(-1, slots_BDLK, values_BDLK)


def _link(
    logits_BDLE: Tensor, slots_BDLK: Tensor, inside_BDLK: Tensor, present_BDLK: Tensor
) -> Tensor:
    """(B, D, L, E) scores on the scale of the chosen experts' values."""
    found = []
    for linked_BDLE in (logits_BDLE, functional.logsigmoid(logits_BDLE)):
        away_BDLK = inside_BDLK - linked_BDLE.gather(-1, slots_BDLK)
        count_BDL1 = present_BDLK.sum(-1, keepdim=True).clamp(min=1)
        shift_BDL1 = away_BDLK.where(present_BDLK, 0).sum(-1, keepdim=True) / count_BDL1
        spread_BDL1 = (away_BDLK - shift_BDL1).abs().where(present_BDLK, 0)
        found.append((linked_BDLE + shift_BDL1, spread_BDL1.amax(-1, keepdim=True)))
    (identity_BDLE, spread_BDL1), (sigmoid_BDLE, other_BDL1) = found
    return torch.where(spread_BDL1 <= other_BDL1 + _TIE, identity_BDLE, sigmoid_BDLE)


def _check_sites(logits_BDLE: Tensor, infos: Sequence[SiteInfo]) -> None:
    L, E = logits_BDLE.shape[2:]
    if len(infos) != L or any(info.num_experts != E for info in infos):
        raise ConfigError(
            f"readings of {L} sites with {E} experts do not fit "
            f"{', '.join(f'{info.site} ({info.num_experts} experts)' for info in infos)}"
        )


def _check_weights(weights_BDLK: Tensor, mass_BDL: Tensor, infos: Sequence[SiteInfo]) -> None:
    wrong_L = ((weights_BDLK < 0).any(-1) | (mass_BDL <= 0)).flatten(0, 1).any(0)
    if bool(wrong_L.any()):
        site = infos[int(wrong_L.nonzero()[0])].site
        raise UnsupportedModelError(
            f"{site} gives experts negative weights, or no weight to any: a softmax cannot repeat "
            f"that. Use a method that shifts the router's logits (mode add), or other layers"
        )
