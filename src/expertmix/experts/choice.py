"""From a router's scores to the decision that is used, with whatever taps change on the way.

    scores (logits) -> probabilities -> selection (top-k) -> weights

Recording alone changes no bit: without edits this is `Router.decide`. Knows no model.

Legend: T tokens, E adapters, K selected.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from expertmix.core.intervention import Stage
from expertmix.core.protocols import Tap
from expertmix.core.site import Site, SiteInfo
from expertmix.errors import InterventionError
from expertmix.routers.router import Router, available_scores
from expertmix.routers.rule import Rule
from expertmix.routers.seen import Seen


def choose(
    router: Router, seen: Seen, info: SiteInfo, taps: Sequence[Tap]
) -> tuple[Tensor, Tensor]:
    """(T, K) adapters and (T, K) weights, edited by the taps and reported to them.

    Raises:
        InterventionError: The edits leave a token too few adapters.
    """
    if not taps:
        return router.decide(seen)
    rule, site = router.rule, info.site
    if not chooses_again(taps, site):
        _show_logits(router, seen, site, taps)
        return _edited_decision(*router.decide(seen), site, taps)
    logits_TE = _edited_logits(router.ranked(seen), site, taps)
    shared_TE = available_scores(_edited_shares(logits_TE, rule, site, taps), seen)
    selection_TE = _unbanned(shared_TE, site, taps)
    if rule.weights != "given":
        _demand(selection_TE, info)
    indices_TK = rule.select(selection_TE, info.top_k)
    weights_TK = rule.weigh(selection_TE.gather(1, indices_TK))
    return _edited_decision(indices_TK, weights_TK, site, taps)


def chooses_again(taps: Sequence[Tap], site: Site) -> bool:
    """Whether any of them edits what decides: then all scores count, not only the highest."""
    return any(_chooses_again(tap, site) for tap in taps)


def _chooses_again(tap: Tap, site: Site) -> bool:
    before = (Stage.LOGITS, Stage.PROBABILITIES, Stage.SELECTION)
    return any(tap.edits(site, stage) for stage in before)


def _show_logits(router: Router, seen: Seen, site: Site, taps: Sequence[Tap]) -> None:
    wanting = [tap for tap in taps if tap.wants(site) and tap.wants_logits()]
    if wanting:
        scores_TE = router.ranked(seen)
        for tap in wanting:
            tap.saw_logits(site, scores_TE)


def _edited_logits(scores_TE: Tensor, site: Site, taps: Sequence[Tap]) -> Tensor:
    for tap in taps:
        if tap.edits(site, Stage.LOGITS):
            scores_TE = tap.edit_scores(site, Stage.LOGITS, scores_TE)
    for tap in taps:
        if tap.wants(site) and tap.wants_logits():
            tap.saw_logits(site, scores_TE)
    return scores_TE


def _edited_shares(scores_TE: Tensor, rule: Rule, site: Site, taps: Sequence[Tap]) -> Tensor:
    """Probabilities are computed only where something edits them: scores say the same."""
    editing = [tap for tap in taps if tap.edits(site, Stage.PROBABILITIES)]
    if not editing:
        return scores_TE
    shares_TE = rule.probabilities(scores_TE)
    for tap in editing:
        shares_TE = tap.edit_scores(site, Stage.PROBABILITIES, shares_TE)
    return rule.scores(shares_TE)


def _unbanned(scores_TE: Tensor, site: Site, taps: Sequence[Tap]) -> Tensor:
    for tap in taps:
        if tap.edits(site, Stage.SELECTION):
            banned_TE = tap.banned(site, scores_TE.device)
            if banned_TE is not None:
                scores_TE = scores_TE.masked_fill(banned_TE, float("-inf"))
    return scores_TE


def _demand(scores_TE: Tensor, info: SiteInfo) -> None:
    """Every token must have K adapters left that do something here."""
    left_T = (~torch.isneginf(scores_TE)).sum(1)  # not isfinite: NaN is the hidden state's fault
    if len(left_T) and int(left_T.min()) < info.top_k:
        raise InterventionError(
            f"the interventions leave a token {int(left_T.min())} adapters at {info.site}, its "
            f"router must choose {info.top_k} among those that do something there. Forbid fewer, "
            f"lower the router's top_k, or use Ablate."
        )


def _edited_decision(
    indices_TK: Tensor, weights_TK: Tensor, site: Site, taps: Sequence[Tap]
) -> tuple[Tensor, Tensor]:
    for tap in taps:
        if tap.grad or tap.edits(site, Stage.WEIGHTS) or _chooses_again(tap, site):
            indices_TK, weights_TK = tap.edit_decision(site, indices_TK, weights_TK)
    for tap in taps:
        if tap.wants(site):
            tap.saw(site, indices_TK, weights_TK)
    return indices_TK, weights_TK
