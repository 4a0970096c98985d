"""Only the sites that matter: the surrogate is attributed to sites, and the best may move.

Knows gradients per site; not what a site is.

Legend: B samples, D decision tokens, L sites, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from expertmix.core.pathway import Mode
from expertmix.core.progress import Progress, quiet
from expertmix.errors import ConfigError
from expertmix.optimize.descent import NGD, begin
from expertmix.optimize.problem import Problem, Solution
from expertmix.optimize.schedule import Optimizer


@dataclass(frozen=True)
class Adaptive:
    """NGD at the sites that promise most, chosen for each sample.

    A site's promise is what the first step could gain there, to first order: Σ g² over its logits
    for gradient descent (a move of −λg), Σ |g| for Adam (a move of −λ sign g). Sites that are not
    chosen keep the start's routing, also for the neighbors in mode `set`, where a pathway is
    replaced as a whole. Costs one step more than NGD.

    Attributes:
        descent: What is narrowed.
        sites: The best so many move.
        share: Instead of `sites`: those whose share of a sample's promise is at least this.

    Raises:
        ConfigError: Both or neither of `sites` and `share`, or impossible ones.
    """

    needs_labels: ClassVar[bool] = False

    descent: NGD = field(default_factory=NGD)
    sites: int | None = 2
    share: float | None = None

    def __post_init__(self) -> None:
        if (self.sites is None) == (self.share is None):
            raise ConfigError(
                f"give either sites (now {self.sites}) or share (now {self.share}), and None for "
                f"the other"
            )
        if self.sites is not None and self.sites < 1:
            raise ConfigError(f"sites={self.sites}: at least one must move")
        if self.share is not None and not 0 <= self.share <= 1:
            raise ConfigError(f"share={self.share}: it is a part of 1")

    @property
    def name(self) -> str:
        """`adaptive`."""
        return "adaptive"

    @property
    def mode(self) -> Mode:
        """Of the pathways that it returns."""
        return self.descent.mode

    def solve(self, problem: Problem, progress: Progress = quiet) -> Solution:
        """See `Method`; notes hold `attribution` (B, L), shares that sum to 1, and `adapted`."""
        surrogate = self.descent.surrogate(problem)
        start, movable = begin(problem.start, self.descent.core, self.mode)
        _, gradient = surrogate.gradient(start)
        shares_BL = promise(gradient.where(movable, 0.0), self.descent.optimizer)
        chosen_BL = self.choose(shares_BL)
        free = chosen_BL[:, None, :, None]
        found = self.descent.descend_on(surrogate, problem, progress, free)
        notes = {**found.notes, "attribution": shares_BL, "adapted": chosen_BL}
        return replace(found, notes=notes)

    def choose(self, shares_BL: Tensor) -> Tensor:
        """(B, L) bool: sites that may move, of their shares."""
        if self.share is not None:
            return shares_BL >= self.share
        count = min(self.sites or 1, shares_BL.shape[1])
        best = shares_BL.topk(count, dim=1).indices
        return torch.zeros_like(shares_BL, dtype=torch.bool).scatter(1, best, True)


def promise(gradient_BDLE: Tensor, optimizer: Optimizer) -> Tensor:
    """(B, L) shares of the first-order gain of one step; 0 where there is none."""
    gain = gradient_BDLE.abs() if optimizer == "adam" else gradient_BDLE.square()
    gain_BL = gain.sum((1, 3))
    total_B1 = gain_BL.sum(1, keepdim=True)
    return torch.where(total_B1 > 0, gain_BL / total_B1, 0.0)
