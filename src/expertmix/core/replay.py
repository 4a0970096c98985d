"""A trace's decisions, forced: `Replay`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from expertmix.core.decision import Decision, fit
from expertmix.core.intervention import Intervention, Stage
from expertmix.core.site import Site, SiteInfo, match
from expertmix.core.tokens import Pass
from expertmix.core.trace import Trace
from expertmix.errors import InterventionError, ReplayError

_SAMPLE = 1 << 40  # a key is sample * _SAMPLE + position


@dataclass(frozen=True, eq=False)
class Replay(Intervention):
    """Force the decisions of a trace: token by token, found by sample and position.

    Padding keeps the router's own decision, so a trace may be replayed with other padding.

    Attributes:
        trace: What to replay.
        sites: Pattern of site names; all sites of the trace by default.
        missing: What a token without a recorded decision gets: an `error`, or the router's own
            decision (`keep`), for example when generation goes on after the trace ends.
        any_model: Accept a trace of a model with another fingerprint.
    """

    kind: ClassVar[str] = "replay"

    trace: Trace
    sites: str = "*"
    missing: Literal["error", "keep"] = "error"
    any_model: bool = False
    _index: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    _decisions: dict[Site, Decision] = field(default_factory=dict, init=False, repr=False)

    @property
    def stages(self) -> frozenset[Stage]:
        """After top-k."""
        return frozenset({Stage.WEIGHTS})

    def targets(self, sites: Sequence[SiteInfo]) -> frozenset[Site]:
        """All matching sites; the trace must hold each of them."""
        found = frozenset(match(self.sites, [info.site for info in sites]))
        known = frozenset(self.trace.sites)
        if self.sites == "*":
            found &= known
        if not found or found - known:
            lost = ", ".join(str(site) for site in sorted(found - known)[:3]) or "every site"
            raise ReplayError(f"the trace has no decisions for {lost}; it was recorded elsewhere")
        return found

    def edit_decision(self, decision: Decision, site: SiteInfo, at: Pass) -> Decision:
        """Replace the selection and the weights by the recorded ones."""
        rows_T, known_T = self._find(at)
        wanted_T = self.addressed(at)
        recorded = self._recorded(site.site)
        theirs = recorded.rows(rows_T.to(recorded.indices.device))
        known_T = known_T & (theirs.indices >= 0).any(1).to(known_T.device)  # the site did run
        if self.missing == "error":
            _demand_all(wanted_T, known_T, site, at)
        return _forced(decision, theirs, (wanted_T & known_T)[:, None])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: names the trace's file.

        Raises:
            InterventionError: The trace has not been saved.
        """
        if self.trace.path is None:
            raise InterventionError("save the trace first: a Replay is written as the trace's path")
        return {
            "kind": self.kind, "trace": str(self.trace.path), "sites": self.sites,
            "missing": self.missing, "any_model": self.any_model, **self.address(),
        }  # fmt: skip

    def _recorded(self, site: Site) -> Decision:
        if site not in self._decisions:
            self._decisions[site] = self.trace[site]
        return self._decisions[site]

    def _find(self, at: Pass) -> tuple[Tensor, Tensor]:
        """(T,) rows of the trace and (T,) whether they are the token's own."""
        if not self._index:
            tokens = self.trace.tokens
            keys = torch.where(tokens.real, tokens.sample * _SAMPLE + tokens.position, -1)
            self._index["keys"], self._index["rows"] = keys.sort(stable=True)
        keys, rows = self._index["keys"], self._index["rows"]
        if not len(keys):
            return at.row, torch.zeros_like(at.tokens.real)
        wanted = (at.tokens.sample * _SAMPLE + at.tokens.position).to(keys.device)
        # the last of equal keys: speculative decoding reads a place again after a rejected token
        slot = (torch.searchsorted(keys, wanted, right=True) - 1).clamp(min=0)
        return rows[slot], (keys[slot] == wanted).to(at.row.device)


def _demand_all(wanted_T: Tensor, known_T: Tensor, site: SiteInfo, at: Pass) -> None:
    missing = (wanted_T & ~known_T).nonzero()
    if len(missing):
        token = missing[0]
        sample, position = at.tokens.sample[token].item(), at.tokens.position[token].item()
        raise ReplayError(
            f"the trace has no decision for sample {sample}, position {position} at {site.site}. "
            f'Replay the same inputs, or pass missing="keep".'
        )


def _forced(mine: Decision, theirs: Decision, forced_T1: Tensor) -> Decision:
    """Their decision where forced; as wide as the forced tokens need, and no wider."""
    filled_K = ((theirs.indices >= 0).to(forced_T1.device) & forced_T1).any(0)
    needed = int(filled_K.nonzero().max()) + 1 if bool(filled_K.any()) else 0
    width = max(mine.top_k, needed)
    indices = fit(theirs.indices, width, -1).clamp(min=0).to(mine.indices)
    weights = fit(theirs.weights, width, 0).to(mine.weights)
    return Decision(
        torch.where(forced_T1, indices, fit(mine.indices, width, 0)),
        torch.where(forced_T1, weights, fit(mine.weights, width, 0)),
        mine.num_experts,
        mine.logits,
    )
