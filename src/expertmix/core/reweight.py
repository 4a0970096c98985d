"""Other weights, given at a stage that is named: `Reweight`.

Legend: T tokens of one pass, E experts, K selected experts, n experts that values are for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from expertmix.core.decision import Decision, fit
from expertmix.core.fields import freeze, optional_integers, vector
from expertmix.core.intervention import Intervention, Stage, matching
from expertmix.core.site import Site, SiteInfo
from expertmix.core.tokens import Pass
from expertmix.errors import InterventionError, StageError

Mode = Literal["set", "add", "scale"]


@dataclass(frozen=True, eq=False)
class Reweight(Intervention):
    """Give weights, at a stage that is named.

    At `logits` and `probabilities` the values replace, shift or scale the router's own and its rule
    then selects. At `weights`, after top-k: `set` makes the values the decision itself (experts
    with value zero are not called, and more than K may be), `add` and `scale` change the weights of
    the experts that were selected and nobody steps in. Values may require gradients.

    Attributes:
        sites: Pattern of site names.
        values: (n,) for every addressed token, or (len(samples), n) with one row per sample; n is
            E, or len(experts) where those are given.
        stage: `logits`, `probabilities` or `weights`.
        mode: `set`, `add` or `scale`.
        experts: The experts that the values are for; all others keep what they have.
    """

    kind: ClassVar[str] = "reweight"

    sites: str
    values: Tensor
    stage: Literal["logits", "probabilities", "weights"]
    mode: Mode = "set"
    experts: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        freeze(self, "experts", optional_integers(self.experts))
        freeze(self, "values", torch.as_tensor(self.values))
        if self.stage not in ("logits", "probabilities", "weights"):
            raise StageError(
                f"Reweight has no stage {self.stage!r}: logits, probabilities, weights"
            )
        if self.mode not in ("set", "add", "scale"):
            raise InterventionError(f"Reweight has no mode {self.mode!r}: set, add, scale")
        if self.values.dim() == 2 and self.samples is None:
            raise InterventionError("Reweight with a row of values per sample needs samples=(…)")
        if self.values.dim() == 2 and len(self.values) != len(self.samples or ()):
            raise InterventionError(
                f"Reweight has {len(self.values)} rows of values "
                f"for {len(self.samples or ())} samples"
            )
        if self.values.dim() not in (1, 2):
            raise InterventionError(
                f"Reweight values must be (n,) or (samples, n), not {tuple(self.values.shape)}"
            )
        if len(set(self.experts or ())) < len(self.experts or ()):
            raise InterventionError(f"Reweight names an expert twice: {list(self.experts or ())}")
        self._check_finite()

    def _check_finite(self) -> None:
        allowed = torch.isfinite(self.values)
        if self.stage == "logits" and self.mode != "scale":
            allowed = allowed | torch.isneginf(self.values)
        if not bool(allowed.all()):
            raise InterventionError(
                "Reweight values must be finite; only logits may be set or lowered to -inf"
            )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Reweight) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash((self.sites, self.stage, self.mode, self.experts, self.samples))

    @property
    def stages(self) -> frozenset[Stage]:
        """The named one."""
        return frozenset({Stage(self.stage)})

    def targets(self, sites: Sequence[SiteInfo]) -> frozenset[Site]:
        """All matching sites; the values must fit each of them."""
        found = matching(self.sites, self.experts or (), sites)
        for info in sites:
            width = info.num_experts if self.experts is None else len(self.experts)
            if info.site in found and self.values.shape[-1] != width:
                raise InterventionError(
                    f"Reweight has {self.values.shape[-1]} values where {info.site} takes {width}"
                )
        return found

    def edit_scores(self, stage: Stage, scores_TE: Tensor, site: SiteInfo, at: Pass) -> Tensor:
        """Replace, shift or scale (T, E) scores."""
        return self._mix(scores_TE, site, at)

    def edit_decision(self, decision: Decision, site: SiteInfo, at: Pass) -> Decision:
        """Change the weights after top-k; `set` decides anew."""
        if self.mode == "set":
            return self._assign(decision, site, at)
        slots_TK = decision.indices.clamp(min=0)
        neutral = 1.0 if self.mode == "scale" else 0.0
        values_TE = self._mix(
            decision.weights.new_full((len(at), site.num_experts), neutral), site, at
        )
        values_TK = values_TE.gather(1, slots_TK)
        weights = decision.weights * values_TK if neutral else decision.weights + values_TK
        return Decision(decision.indices, weights, decision.num_experts, decision.logits)

    def _assign(self, decision: Decision, site: SiteInfo, at: Pass) -> Decision:
        dense_TE = self._mix(decision.dense(), site, at)
        mine_T1 = self.addressed(at)[:, None]
        called_TE = (dense_TE != 0) & mine_T1
        width = max(decision.top_k, int(called_TE.sum(1).max()) if len(at) else 0)
        indices_TK = called_TE.to(torch.float32).topk(width, dim=1).indices.to(decision.indices)
        weights_TK = torch.where(
            mine_T1, dense_TE.gather(1, indices_TK.long()), fit(decision.weights, width, 0)
        )
        indices_TK = torch.where(mine_T1, indices_TK, fit(decision.indices, width, 0))
        return Decision(indices_TK, weights_TK, decision.num_experts, decision.logits)

    def _mix(self, scores_TE: Tensor, site: SiteInfo, at: Pass) -> Tensor:
        values = self.values.to(scores_TE)
        if values.dim() == 2:
            rows = vector(self.samples or (), at.row)
            values = values[(at.row[:, None] == rows).to(torch.int8).argmax(1)]
        columns = vector(range(site.num_experts) if self.experts is None else self.experts, at.row)
        old = scores_TE[:, columns]
        new = {"set": values.expand_as(old), "add": old + values, "scale": old * values}[self.mode]
        new = torch.where(self.addressed(at)[:, None], new, old)
        return scores_TE.index_copy(1, columns, new)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; gradients are not kept."""
        values = self.values.detach().to(torch.float64).tolist()
        optional = {} if self.experts is None else {"experts": list(self.experts)}
        return {
            "kind": self.kind, "sites": self.sites, "values": values, "stage": self.stage,
            "mode": self.mode, **optional, **self.address(),
        }  # fmt: skip
