"""Mode finding: climb to where pathways that succeeded lie dense.

Knows the reference set's pathways as distributions over experts; computes no gradient.

Legend: B samples, N references, k nearest ones, D decision tokens, L sites, E experts,
X = D · L · E.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from expertmix.core.pathway import Mode
from expertmix.core.progress import Progress, quiet
from expertmix.errors import ConfigError
from expertmix.optimize.item import NO_NEIGHBORS
from expertmix.optimize.probes import neighbor_probes
from expertmix.optimize.problem import Problem, Solution
from expertmix.optimize.regression import Search

_PAIRED = 256  # references whose distances give the bandwidth


@dataclass(frozen=True)
class ModeFinding:
    """Mean shift among pathways (C3PO, arXiv 2504.07964), then `Search`.

    p ← Σᵢ K(p, pᵢ) pᵢ / Σᵢ K(p, pᵢ), K(p, q) = exp(−‖p − q‖² / 2h²), where p and pᵢ are the
    pathways of the sample and of the references as distributions over experts, all sites side by
    side. Neighbors and kernel live in ω-space, so the surrogate that chooses α asks the `k` nearest
    there. The paper's neighborhood of the shift is not stated; here it is the whole reference set
    (`among` narrows it), less what the problem's neighbors leave out as near-duplicates.

    Attributes:
        search: How far to move.
        steps: Of the mean shift; 0 leaves the base alone.
        bandwidth: h; None for the median rule: the median distance between references' pathways
            (of the first 256, if there are more).
        k: Neighbors in ω-space whose losses choose α.
        among: The shift sees the nearest so many; None for all.

    Raises:
        ConfigError: An impossible setting.
    """

    needs_labels: ClassVar[bool] = False

    search: Search = field(default_factory=Search)
    steps: int = 10
    bandwidth: float | None = None
    k: int = 3
    among: int | None = None

    def __post_init__(self) -> None:
        for key, least in (("steps", 0), ("k", 0), ("among", 1)):
            value = getattr(self, key)
            if value is not None and value < least:
                raise ConfigError(f"{key}={value}: it must be at least {least}")
        if self.bandwidth is not None and not self.bandwidth > 0:
            raise ConfigError(f"bandwidth={self.bandwidth}: it must be above 0")

    @property
    def name(self) -> str:
        """`mode_finding`."""
        return "mode_finding"

    @property
    def mode(self) -> Mode:
        """Pathways are set."""
        return "set"

    def solve(self, problem: Problem, progress: Progress = quiet) -> Solution:
        """See `Method`; notes as of kernel regression."""
        start_BX = problem.start.softmax(-1).flatten(1)
        own_NX = problem.reference.start.to(problem.start).softmax(-1).flatten(1)
        repeats_BN = problem.finder.repeats(problem.neighbors.query, problem.samples)
        allowed_BN = ~repeats_BN.to(start_BX.device)
        h = self.bandwidth or median_distance(own_NX)
        if not len(own_NX) or not self.steps or not h:
            nobody = torch.zeros(len(start_BX), dtype=torch.bool, device=start_BX.device)
            return Solution(problem.start, "set", nobody, reasons=_reasons(allowed_BN))
        target_BX = start_BX
        for step in range(self.steps):
            target_BX = self.shift(target_BX, own_NX, allowed_BN, h)
            progress("mean shift", step + 1, self.steps)
        squared_BN = _squared(start_BX, own_NX).masked_fill(~allowed_BN, torch.inf)
        near_Bk, found_Bk = squared_BN.topk(min(self.k, len(own_NX)), dim=1, largest=False)
        weights_Bk = torch.softmax(-near_Bk / (2 * h * h), 1).nan_to_num(nan=0.0)
        found_Bk = found_Bk.masked_fill(near_Bk.isinf(), -1)
        found = self.search.move(
            problem, target_BX.view_as(problem.start), allowed_BN.any(1),
            neighbor_probes(problem.reference, found_Bk, weights_Bk),
        )  # fmt: skip
        return replace(found, reasons=_reasons(allowed_BN))

    def shift(self, at_BX: Tensor, own_NX: Tensor, allowed_BN: Tensor, h: float) -> Tensor:
        """(B, X) one step of the mean shift; a sample that may see nobody stays."""
        squared_BN = _squared(at_BX, own_NX).masked_fill(~allowed_BN, torch.inf)
        if self.among is not None and self.among < len(own_NX):
            far_B1 = squared_BN.kthvalue(self.among, dim=1, keepdim=True).values
            squared_BN = squared_BN.masked_fill(squared_BN > far_B1, torch.inf)
        shares_BN = torch.softmax(-squared_BN / (2 * h * h), 1)
        return torch.where(
            allowed_BN.any(1)[:, None], shares_BN.nan_to_num(nan=0.0) @ own_NX, at_BX
        )


def _reasons(allowed_BN: Tensor) -> list[str]:
    return ["" if known else NO_NEIGHBORS for known in allowed_BN.any(1).tolist()]


def median_distance(own_NX: Tensor) -> float:
    """The median distance between pathways of references; 0 where fewer than two differ."""
    pairs = torch.pdist(own_NX[:_PAIRED].double())
    pairs = pairs[pairs > 0]
    return float(pairs.median()) if len(pairs) else 0.0


def _squared(a_BX: Tensor, b_NX: Tensor) -> Tensor:
    return torch.cdist(a_BX, b_NX, compute_mode="donot_use_mm_for_euclid_dist").square()
