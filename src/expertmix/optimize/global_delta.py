"""One shift for all samples: the control that shows what adapting to a sample is worth.

Knows the reference set as a training set; looks at no test sample.

Legend: B samples, N references, D decision tokens, L sites, E experts.
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
from expertmix.optimize.memo import Memo, source_of
from expertmix.optimize.probes import neighbor_probes
from expertmix.optimize.problem import Problem, Solution


@dataclass(frozen=True)
class GlobalDelta:
    """δ* = argmin_δ meanᵢ ℓ(f(xᵢ, rᵢ + δ), yᵢ) over the references: a logit vector per site.

    The routers' live logits rᵢ are shifted, in mode `add`. It is learned once for a model and a
    reference set, by as many full steps as the descent has, and kept in `memo`.

    Attributes:
        descent: How; `parameter` and `core` have no say over a shift for all, and every logit of
            it may move. `core` still bounds how many experts a token calls.
        most: References that are learned from, at most: a seeded draw; None for all.
        seed: Of the draw.
        memo: Holds δ of the model and references of the last call.

    Raises:
        ConfigError: The descent has a trust region, which is a matter of a single sample.
    """

    needs_labels: ClassVar[bool] = False

    descent: NGD = field(default_factory=NGD)
    most: int | None = 256
    seed: int = 0
    memo: Memo[tuple[Tensor, ...]] = field(
        default_factory=Memo, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if self.descent.trust is not None:
            raise ConfigError("a global delta has no trust region: leave out trust")
        if self.most is not None and self.most < 1:
            raise ConfigError(f"most={self.most}: it is learned from at least one reference")

    @property
    def name(self) -> str:
        """`global_delta`."""
        return "global_delta"

    @property
    def mode(self) -> Mode:
        """Live logits are shifted."""
        return "add"

    def solve(self, problem: Problem, progress: Progress = quiet) -> Solution:
        """See `Method`: every sample gets the same shift."""
        values, losses = self.memo.get(source_of(problem), lambda: self._learn(problem, progress))
        B = len(problem.start)
        trail = Trail(
            [torch.zeros_like(problem.start[:, :1]), values.expand(B, *values.shape[1:]).clone()],
            losses.expand(2, B), losses.new_zeros(2, B, 0),
        )  # fmt: skip
        step = torch.ones(B, dtype=torch.int64)
        return settle(trail, step, problem, "add", self.descent.core)

    def _learn(self, problem: Problem, progress: Progress) -> tuple[Tensor, ...]:
        """(1, 1, L, E) the shift, and (2, 1) the loss before and after."""
        descent = replace(self.descent, parameter="add")
        count = len(problem.reference.samples)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed))
        chosen = order[: self.most].sort().values[None]
        one = replace(
            problem,
            samples=(),
            readings=(),
            start=torch.zeros_like(problem.start[:1]),
            mass=torch.ones_like(problem.mass[:1]),
        )
        probes = neighbor_probes(problem.reference, chosen, torch.ones(chosen.shape))
        surrogate = descent.surrogate(one, probes, keep=False)
        trail = replace(descent, core=None).trail(surrogate, one, progress)
        kept = int(earliest_best(trail.losses[:, 0]))
        last = kept if descent.keep == "best" else len(trail.values) - 1
        return trail.values[last], trail.losses[[0, last]]
