"""How far to descend, chosen by neighbors that the descent did not see.

Knows an NGD and its trail; not what its probes are about.

Legend: B samples, k neighbors, F = B · k folds, T steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from expertmix.core.pathway import Mode
from expertmix.core.progress import Progress, quiet
from expertmix.errors import ConfigError
from expertmix.optimize.aggregate import earliest_best
from expertmix.optimize.descent import NGD, Trail, settle
from expertmix.optimize.probes import Probe
from expertmix.optimize.problem import Problem, Solution


@dataclass(frozen=True)
class LeaveOneOut:
    """NGD that stops where neighbors left out of it fare best.

    For each neighbor j the descent runs on the others and gives ω₋ⱼ(t); the step is
    t* = argmin_t Σⱼ Kⱼ ℓ(f(xⱼ, ω₋ⱼ(t)), yⱼ) / Σⱼ Kⱼ, the earliest of equals, and the answer is
    ω(t*) of the descent on all. t* = 0 is the base: neighbors that contradict each other stop it.
    With a single neighbor nothing can be held out, and the base is kept.

    Cost: k folds of k neighbors each and the descent itself, k + 1 times NGD for each rate.

    Attributes:
        descent: What is stopped; its `keep` has nothing to do.
        rates: Factors of `lr` and `final_lr` that are tried as well; the best held-out loss wins,
            the earlier of equals.

    Raises:
        ConfigError: No rates, or one that is not above 0.
    """

    needs_labels: ClassVar[bool] = False

    descent: NGD = field(default_factory=NGD)
    rates: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        if not self.rates or min(self.rates) <= 0:
            raise ConfigError(f"rates={self.rates}: give at least one factor, all above 0")

    @property
    def name(self) -> str:
        """`leave_one_out`."""
        return "leave_one_out"

    @property
    def mode(self) -> Mode:
        """Of the pathways that it returns."""
        return self.descent.mode

    def solve(self, problem: Problem, progress: Progress = quiet) -> Solution:
        """See `Method`; notes hold the step, the rate and the held-out losses (B, T + 1)."""
        runs = [self._run(problem, rate, progress) for rate in self.rates]
        held_RTB = torch.stack([held for _, held in runs]).nan_to_num(nan=torch.inf).cpu()
        step_RB, least_RB = earliest_best(held_RTB, 1), held_RTB.amin(1)
        rate_B = earliest_best(least_RB)
        step_B = step_RB.gather(0, rate_B[None])[0]
        step_B = torch.where(least_RB.amin(0).isfinite(), step_B, 0)
        mine = _of_each([trail for trail, _ in runs], rate_B)
        solution = settle(mine, step_B, problem, self.mode, self.descent.core)
        notes = {
            **solution.notes,
            "rate": torch.tensor(self.rates)[rate_B],
            "held_out": held_RTB[rate_B, :, torch.arange(len(rate_B))],
        }
        return replace(solution, notes=notes)

    def _run(self, problem: Problem, rate: float, progress: Progress) -> tuple[Trail, Tensor]:
        """The descent on all neighbors, and (T + 1, B) held-out losses."""
        descent = replace(
            self.descent, lr=self.descent.lr * rate, final_lr=self.descent.final_lr * rate
        )
        surrogate = descent.surrogate(problem)
        whole = descent.trail(surrogate, problem, progress)
        B, k = surrogate.weights.shape
        folded = replace(
            problem,
            start=problem.start.repeat_interleave(k, 0),
            mass=problem.mass.repeat_interleave(k, 0),
        )
        folds = descent.surrogate(folded, held_out(surrogate.probes, k))
        trail = descent.trail(folds, folded, progress)
        each_TBk = trail.per_neighbor.view(len(trail.values), B, k, k).diagonal(dim1=2, dim2=3)
        trained_Bk = folds.judged.view(B, k)  # a fold that nobody else judges says nothing
        weights_Bk = (surrogate.weights * trained_Bk).to(each_TBk)
        weights_Bk = weights_Bk / weights_Bk.sum(1, keepdim=True)
        return whole, torch.where(weights_Bk > 0, each_TBk * weights_Bk, 0.0).sum(-1).where(
            weights_Bk.isfinite().all(1), torch.nan
        )


def held_out(probes: tuple[Probe, ...], k: int) -> list[Probe]:
    """The probes of B · k folds: in fold b · k + j sample b's probe j is asked without weight."""
    return [
        replace(
            probe, owner=probe.owner * k + out, weight=0.0 if probe.slot == out else probe.weight
        )
        for probe in probes
        for out in range(k)
    ]


def _of_each(trails: list[Trail], pick_B: Tensor) -> Trail:
    """One trail that follows, for each sample, the run that it picked."""
    if len(trails) == 1:
        return trails[0]
    rows = torch.arange(len(pick_B))
    values = [
        torch.stack([trail.values[step] for trail in trails])[pick_B, rows]
        for step in range(len(trails[0].values))
    ]
    losses = torch.stack([trail.losses for trail in trails])[pick_B, :, rows].T
    per_neighbor = torch.stack([trail.per_neighbor for trail in trails])[pick_B, :, rows]
    return Trail(values, losses, per_neighbor.transpose(0, 1))
