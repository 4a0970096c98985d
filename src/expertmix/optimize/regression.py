"""Kernel regression: move toward what the neighbors' own routing was, as far as it helps.

Knows pathways as distributions over experts; computes no gradient.

Legend: B samples, k neighbors, D decision tokens, L sites, E experts, G values of α.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from expertmix.core.pathway import Mode
from expertmix.core.progress import Progress, quiet
from expertmix.errors import ConfigError
from expertmix.optimize.aggregate import (
    Aggregate,
    check_aggregate,
    earliest_best,
    influence,
    joined,
)
from expertmix.optimize.descent import hard_width
from expertmix.optimize.probes import Probe
from expertmix.optimize.problem import Problem, Solution
from expertmix.optimize.surrogate import Objective, Rule, Surrogate


@dataclass(frozen=True)
class Search:
    """The move both of kernel regression and of mode finding: ω ← αω + (1 − α)ω̂.

    It is made between distributions over all experts, p = softmax(ω), and the logarithm is taken
    of the result. α* = argmin L over a grid, all of it in one batched evaluation where the limit
    allows; of equal values the nearest to the base. L is taken with the hard top K, which is what
    will be used: no gradient is needed here.

    Attributes:
        alpha: `search`, or a number from 0 (the target) to 1 (the base).
        grid: How many values of α are compared, evenly from 1 to 0.
        objective: See `Rule`, as for the next four.
        temperature: Of the objective `choice`.
        aggregate: Of the neighbors' losses.
        trim: Of the aggregate `trimmed`.
        limit: Probes in one batch.
        hard: Whether L is taken with the top K, or with all experts called.

    Raises:
        ConfigError: An impossible setting.
    """

    alpha: float | str = "search"
    grid: int = 6
    objective: Objective = "answer"
    temperature: float = 1.0
    aggregate: Aggregate = "mean"
    trim: float = 0.25
    limit: int = 64
    hard: bool = True

    def __post_init__(self) -> None:
        Rule(self.objective, self.temperature, self.aggregate, self.trim, self.limit)
        if self.alpha != "search" and not (
            isinstance(self.alpha, int | float) and 0 <= self.alpha <= 1
        ):
            raise ConfigError(f"alpha={self.alpha!r}: it is 'search' or a number from 0 to 1")
        if self.grid < 2:
            raise ConfigError(f"grid={self.grid}: at least the base and the target are compared")

    def move(
        self, problem: Problem, target_BDLE: Tensor, known_B: Tensor, probes: list[Probe] | None
    ) -> Solution:
        """The solution for a target.

        Args:
            problem: Whose starts are moved.
            target_BDLE: (B, D, L, E) distributions.
            known_B: (B,) bool: samples that have a target.
            probes: Who judges; None for the neighbors of the problem.
        """
        base_BDLE = problem.start.softmax(-1)
        if not isinstance(self.alpha, str):
            alpha_B = torch.full((len(known_B),), float(self.alpha)).to(base_BDLE)
            return self._at(problem, base_BDLE, target_BDLE, alpha_B, known_B)
        surrogate = Surrogate(
            problem, probes, objective=self.objective, temperature=self.temperature,
            aggregate=self.aggregate, trim=self.trim, limit=self.limit,
            width=hard_width(problem.pathways) if self.hard else None,
        )  # fmt: skip
        alphas_G = torch.linspace(1, 0, self.grid).to(base_BDLE)
        tried = [problem.start]
        tried += [mixed(base_BDLE, target_BDLE, alpha) for alpha in alphas_G[1:]]
        curve_GB = surrogate.many(torch.stack(tried))
        best_B = earliest_best(curve_GB)
        known_B = known_B & curve_GB[0].isfinite().to(known_B.device)
        found = self._at(problem, base_BDLE, target_BDLE, alphas_G[best_B], known_B)
        losses = torch.stack([curve_GB[0], curve_GB.gather(0, best_B[None])[0]])
        notes = {**found.notes, "curve": curve_GB.T}
        return replace(found, losses=losses, notes=notes)

    def _at(
        self, problem: Problem, base: Tensor, target: Tensor, alpha_B: Tensor, known_B: Tensor
    ) -> Solution:
        alpha_B = torch.where(known_B, alpha_B, 1.0)
        changed = alpha_B < 1
        shaped = alpha_B.view(-1, 1, 1, 1)
        moved = mixed(base, target, shaped)
        values = torch.where(changed.view(-1, 1, 1, 1), moved, problem.start)
        return Solution(values, "set", changed, notes={"alpha": alpha_B})


@dataclass(frozen=True)
class KernelRegression:
    """Kernel regression (C3PO, arXiv 2504.07964): ω̂ = Σ K(xᵢ, x) ωᵢ / Σ K(xᵢ, x), then `Search`.

    ωᵢ is the neighbor's own pathway as a distribution over all experts, so ω̂ is one too. Averages
    are flatter than what they average; the base's top-K mass is kept, so nothing shrinks.

    Attributes:
        search: How far to move.
        combine: Of the neighbors' distributions: their weighted `mean`, as in the paper; the
            weighted `median` or `trimmed` mean of each expert's probability (renormalized), which
            a poisoned reference cannot pull away.
        cut: Share of the weight that this `trimmed` leaves away at each end.

    Raises:
        ConfigError: An impossible setting.
    """

    needs_labels: ClassVar[bool] = False

    search: Search = field(default_factory=Search)
    combine: Aggregate = "mean"
    cut: float = 0.25

    def __post_init__(self) -> None:
        check_aggregate(self.combine, self.cut)

    @property
    def name(self) -> str:
        """`kernel_regression`."""
        return "kernel_regression"

    @property
    def mode(self) -> Mode:
        """Pathways are set."""
        return "set"

    def solve(self, problem: Problem, progress: Progress = quiet) -> Solution:
        """See `Method`; notes hold each sample's α, and its L over the grid as `curve`."""
        target = self.target(problem)
        known = (problem.neighbors.weights.sum(1) > 0).to(target.device)
        solution = self.search.move(problem, target, known, None)
        progress("kernel regression", 1, 1)
        return solution

    def target(self, problem: Problem) -> Tensor:
        """(B, D, L, E) ω̂ as distributions; the base's for a sample without neighbors."""
        base_BDLE = problem.start.softmax(-1)
        if not problem.neighbors.indices.shape[1] or not len(problem.reference.samples):
            return base_BDLE
        weights_Bk = problem.neighbors.weights.to(base_BDLE)
        found = problem.neighbors.indices.clamp(min=0).to(problem.reference.start.device)
        own_BDLEk = problem.reference.start[found].to(base_BDLE).softmax(-1).movedim(1, -1)
        weights_BDLEk = weights_Bk[:, None, None, None].expand_as(own_BDLEk)
        shares_BDLEk = influence(own_BDLEk, weights_BDLEk, self.combine, self.cut)
        mean_BDLE = joined(own_BDLEk, shares_BDLEk)
        total = mean_BDLE.sum(-1, keepdim=True)
        return torch.where(total > 0, mean_BDLE / total, base_BDLE)


def mixed(base: Tensor, target: Tensor, alpha: Tensor | float) -> Tensor:
    """Logits of αp + (1 − α)p̂: minus infinity where both are 0."""
    return (alpha * base + (1 - alpha) * target).log()
