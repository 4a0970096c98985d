"""The tap that puts a pathway into a pass.

Decision tokens get other experts and weights, all other tokens keep their own. A decision token
may call more than K experts; then all rows get wider, with zero weights (see `sparing`).

Knows tokens by their flat numbers in a pass; no model.

Legend: T tokens of the pass, n decision tokens, L sites, E experts, K selected ones, V > K called.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from expertmix.bindings.slots import Placed
from expertmix.core.intervention import Stage
from expertmix.core.site import Site, SiteInfo
from expertmix.errors import UnsupportedRuntimeError

_TIE = 1e-5  # share of the weights that is rounding


@dataclass(eq=False)
class PathwayTap:
    """Listens at the critical sites, and edits them where it holds a pathway.

    Attributes:
        infos: The critical sites.
        shift: Whether pathways of mode `add` will come.
        placed: The pathway of the next pass, or None.
        seen: Per site, what the experts got in the last pass.
        logits: Per site, what the gate gave.
    """

    infos: Sequence[SiteInfo]
    shift: bool = False
    placed: Placed | None = None
    seen: dict[Site, tuple[Tensor, Tensor]] = field(default_factory=dict)
    logits: dict[Site, Tensor] = field(default_factory=dict)
    grad: bool = False
    _tokens: int | None = None

    def __post_init__(self) -> None:
        self._number = {info.site: number for number, info in enumerate(self.infos)}

    @property
    def open(self) -> bool:
        """Whether a pass is running."""
        return self._tokens is not None

    def begin(self, ids_BS: Tensor, real_BS: Tensor, *, past: int = 0) -> None:
        """A pass starts."""
        self._tokens = ids_BS.numel()
        self.seen, self.logits = {}, {}

    def end(self) -> None:
        """The pass is complete."""
        self._tokens = None

    def abandon(self) -> None:
        """The pass failed."""
        self._tokens = None

    def rest(self) -> None:
        """Forget the pathway and the last pass, and with it its graph."""
        self._tokens, self.placed = None, None
        self.seen, self.logits = {}, {}

    def decisions(self, last: int, count: int, depth: int) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (D, L, E), indices (D, L, K) and weights (D, L, K) that the last pass had.

        Args:
            last: Flat number of a prompt's last token.
            count: How many decision tokens there are, up to that one.
            depth: D; the first one is repeated in front.
        """
        flat = last + 1 - count + (torch.arange(depth) - (depth - count)).clamp(min=0)
        kept = [self._of(info, flat) for info in self.infos]
        logits, indices, weights = (torch.stack(parts, 1) for parts in zip(*kept, strict=True))
        return logits, indices, weights

    def _of(self, info: SiteInfo, flat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if info.site not in self.seen:
            raise UnsupportedRuntimeError(
                f"{info.site} did not run: every token had halted before. Set "
                f"config.halting_threshold to None for pathways, or name earlier sites (layers=…)."
            )
        indices, weights = (
            part.detach()[flat.to(part.device)].cpu() for part in self.seen[info.site]
        )
        indices, weights = indices.to(torch.int64), weights.float()
        logits = self.logits.get(info.site)
        if logits is None:
            dense = weights.new_zeros(len(flat), info.num_experts)
            return dense.scatter_add(1, indices, weights).log(), indices, weights
        return logits.detach()[flat.to(logits.device)].float().cpu(), indices, weights

    def edits(self, site: Site, stage: Stage) -> bool:
        """At the critical sites: weights, and logits where pathways shift them."""
        stages = {Stage.WEIGHTS, Stage.LOGITS} if self.shift else {Stage.WEIGHTS}
        return site in self._number and stage in stages

    def banned(self, site: Site, device: torch.device) -> Tensor | None:
        """Nothing is forbidden."""
        return None

    def edit_scores(self, site: Site, stage: Stage, scores_TE: Tensor) -> Tensor:
        """Shift the decision tokens' logits."""
        placed = self.placed
        if placed is None or not placed.add:
            return scores_TE
        shift_nE = placed.values[:, self._number[site]].to(scores_TE)
        return scores_TE.index_add(0, placed.rows.to(scores_TE.device), shift_nE)

    def edit_decision(
        self, site: Site, indices_TK: Tensor, weights_TK: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Give decision tokens the experts and weights of the pathway."""
        self._check(site, len(indices_TK))
        if self.placed is None:
            self._note(site, indices_TK, weights_TK)
        placed, number = self.placed, self._number[site]
        if placed is None or (placed.add and placed.width <= indices_TK.shape[1]):
            return indices_TK, weights_TK
        rows = placed.rows.to(indices_TK.device)
        values_nE, mass_n = placed.values[:, number].to(rows.device), placed.mass[:, number]
        if placed.add:  # the gate's logits are shifted already
            values_nE = shares(self.logits[site][rows], indices_TK[rows], weights_TK[rows])
            mass_n = weights_TK[rows].sum(1)
        if not values_nE.dtype.is_floating_point or values_nE.dtype.itemsize < 4:
            values_nE = values_nE.float()
        mine_nV, best_nV = values_nE.topk(min(placed.width, values_nE.shape[1]), dim=1)
        mine_nV = mass_n[:, None].to(mine_nV) * mine_nV.softmax(1)
        return _put(indices_TK, rows, best_nV), _put(weights_TK, rows, mine_nV)

    def saw(self, site: Site, indices_TK: Tensor, weights_TK: Tensor) -> None:
        """Noted before: padding may have been left out since."""

    def saw_logits(self, site: Site, logits_TE: Tensor) -> None:
        """Note what the gate gave, first report first."""
        self.logits.setdefault(site, logits_TE)

    def wants(self, site: Site) -> bool:
        """The critical sites are recorded."""
        return site in self._number

    def wants_logits(self) -> bool:
        """Logits are recorded."""
        return True

    def _note(self, site: Site, indices_TK: Tensor, weights_TK: Tensor) -> None:
        if site in self.seen:
            raise UnsupportedRuntimeError(
                f"{site} ran twice in one pass: this model loops over its layers, and one pathway "
                f"would be two decisions there"
            )
        self.seen[site] = indices_TK, weights_TK

    def _check(self, site: Site, tokens: int) -> None:
        if tokens != self._tokens:
            raise UnsupportedRuntimeError(
                f"{site} saw {tokens} tokens, the pass has {self._tokens}: decision tokens cannot "
                f"be told apart there. Choose other layers."
            )


def _put(old_TK: Tensor, rows: Tensor, new_nV: Tensor) -> Tensor:
    """(T, max(K, V)): the rows replaced, everything padded with zeros."""
    pad = (0, max(0, new_nV.shape[1] - old_TK.shape[1]))
    short = (0, max(0, old_TK.shape[1] - new_nV.shape[1]))
    padded_nV = nn.functional.pad(new_nV, short).to(old_TK.dtype)
    return nn.functional.pad(old_TK, pad).index_copy(0, rows, padded_nV)


def shares(logits_nE: Tensor, indices_nK: Tensor, weights_nK: Tensor) -> Tensor:
    """(n, E) logits whose softmax over any experts gives the shares that their router would give.

    Routers turn logits into weights by a softmax or by sigmoids; the weights that a token got tell
    which, without a look at other tokens. Where both explain them, it is the softmax.
    """
    logits_nE = logits_nE.float()
    through = logits_nE, nn.functional.logsigmoid(logits_nE)
    with torch.no_grad():
        total_n1 = weights_nK.float().sum(1, keepdim=True)
        softmax_n1, sigmoid_n1 = (
            (one.gather(1, indices_nK.long()).softmax(1) * total_n1 - weights_nK)
            .abs()
            .sum(1, keepdim=True)
            for one in through
        )
    return torch.where(sigmoid_n1 < softmax_n1 - _TIE * total_n1, through[1], through[0])
