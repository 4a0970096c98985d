"""Taking experts away: `Ablate` after selection, `Mask` before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from expertmix.core.decision import Decision
from expertmix.core.fields import freeze, integers, vector
from expertmix.core.intervention import Intervention, Stage, matching
from expertmix.core.site import Site, SiteInfo
from expertmix.core.tokens import Pass
from expertmix.errors import InterventionError


@dataclass(frozen=True)
class _Removal(Intervention):
    sites: str
    experts: tuple[int, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        freeze(self, "experts", integers(self.experts))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "kind": self.kind, "sites": self.sites, "experts": list(self.experts),
            **self.address(),
        }  # fmt: skip


@dataclass(frozen=True)
class Ablate(_Removal):
    """Drop experts after selection: their weight is zero and nobody steps in.

    The expert's output is lost and the other weights stay as they are. Compare `Mask`.

    Attributes:
        sites: Pattern of site names, such as `*.layers.7.mlp`.
        experts: Numbers of the experts.
    """

    kind: ClassVar[str] = "ablate"

    @property
    def stages(self) -> frozenset[Stage]:
        """After top-k."""
        return frozenset({Stage.WEIGHTS})

    def targets(self, sites: Sequence[SiteInfo]) -> frozenset[Site]:
        """All matching sites; each must have the experts."""
        return matching(self.sites, self.experts, sites)

    def edit_decision(self, decision: Decision, site: SiteInfo, at: Pass) -> Decision:
        """Set the weight of the experts to zero."""
        dropped_TK = torch.isin(decision.indices, vector(self.experts, decision.indices))
        dropped_TK &= self.addressed(at)[:, None]
        weights = decision.weights.masked_fill(dropped_TK, 0)
        return Decision(decision.indices, weights, decision.num_experts, decision.logits)


@dataclass(frozen=True)
class Mask(_Removal):
    """Forbid experts before selection: the router's own rule chooses again among the others.

    Attributes:
        sites: Pattern of site names.
        experts: Numbers of the experts that may not be chosen.
    """

    kind: ClassVar[str] = "mask"

    @property
    def stages(self) -> frozenset[Stage]:
        """On the logits (so that no mass is kept) and again where top-k reads its scores."""
        return frozenset({Stage.LOGITS, Stage.SELECTION})

    def targets(self, sites: Sequence[SiteInfo]) -> frozenset[Site]:
        """All matching sites; each must keep at least K experts."""
        found = matching(self.sites, self.experts, sites)
        for info in sites:
            left = info.num_experts - len(set(self.experts))
            if info.site in found and left < info.top_k:
                raise InterventionError(
                    f"Mask leaves {left} experts at {info.site}, but its router must choose "
                    f"{info.top_k}. Mask fewer experts, or use Ablate."
                )
        return found

    def edit_scores(self, stage: Stage, scores_TE: Tensor, site: SiteInfo, at: Pass) -> Tensor:
        """Set the scores of the experts to minus infinity."""
        return scores_TE.masked_fill(self.banned(site, at), float("-inf"))

    def banned(self, site: SiteInfo, at: Pass) -> Tensor:
        """(T, E) bool: what may not be chosen."""
        experts_E = torch.zeros(site.num_experts, dtype=torch.bool, device=at.row.device)
        experts_E[list(self.experts)] = True
        return self.addressed(at)[:, None] & experts_E
