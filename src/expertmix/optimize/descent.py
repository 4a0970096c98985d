"""NGD: gradient descent on the surrogate, for all samples of a problem at once.

Knows pathways and their surrogate; not where its probes come from.

Legend: B samples, D decision tokens, L sites, E experts, T steps, k probes of a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, get_args

import torch
from torch import Tensor

from expertmix.core.pathway import Mode, Pathways
from expertmix.core.progress import Progress, quiet
from expertmix.errors import ConfigError
from expertmix.optimize.aggregate import Aggregate, earliest_best
from expertmix.optimize.probes import Probe
from expertmix.optimize.problem import Problem, Solution
from expertmix.optimize.schedule import Mover, Optimizer, cosine
from expertmix.optimize.surrogate import Evaluation, Objective, Rule, Surrogate
from expertmix.optimize.trust import divergence, project


class Landscape(Protocol):
    """What can be descended: a surrogate, or anything that is evaluated like one."""

    def evaluate(self, values: Tensor, *, gradient: bool = False) -> Evaluation:
        """At (B, D, L, E) logits."""


@dataclass(frozen=True, eq=False, slots=True)
class Trail:
    """Where a descent went.

    Attributes:
        values: T + 1 times (B, D or 1, L, E): before the first step and after each.
        losses: (T + 1, B) the surrogate there.
        per_neighbor: (T + 1, B, k) loss of each probe there.
    """

    values: Sequence[Tensor]
    losses: Tensor
    per_neighbor: Tensor

    def at(self, step_B: Tensor) -> Tensor:
        """(B, …) the values of each sample at a step of its own."""
        return torch.stack([self.values[step][row] for row, step in enumerate(step_B.tolist())])


@dataclass(frozen=True)
class NGD:
    """Neighborhood gradient descent (C3PO, arXiv 2504.07964): ω ← ω − λₜ ∇L(ω).

    ω are logits on the core experts: per sample, token and site the `core` likeliest of the base,
    all others stay out. While descending every core expert is called, so that all have gradients;
    what comes out is meant to be used with the router's own top K.

    The paper has λ from 1e-2 to 1e-5 on a cosine, and does not say for which parametrization. On
    logits plain gradient descent at these rates moves nothing that can be seen: the gradient of an
    answer's loss in a routing logit is small. Adam moves each logit by up to about λ a step; of
    0.3, 1 and 2, 1 was best on development data (docs/papers/c3po.md). Adam is blind to the size of
    a gradient, so it moves as far where nothing matters: `trust` bounds that.

    Attributes:
        steps: T; 0 leaves the base alone.
        lr: λ of the first step.
        final_lr: Where the cosine ends.
        optimizer: `gd` or `adam`.
        core: Core experts; None for all.
        objective: See `Rule`, as for the next four.
        temperature: Of the objective `choice`.
        aggregate: Of the neighbors.
        trim: Of the aggregate `trimmed`.
        limit: Probes in one batch.
        parameter: `set`: ω replaces the neighbors' routing, as in the paper. `add`: ω is a shift δ
            of the router's live logits, of the sample and of its neighbors, that starts at 0; one
            shift serves all decision tokens.
        hard: Call only the top K while descending; experts outside have no gradient then.
        keep: `last`, or the `best` step seen on the surrogate.
        trust: Limit in nats of KL(ω ‖ base), a mean over tokens and sites; after each step a sample
            beyond it is drawn back on the line to its start. None: no limit.

    Raises:
        ConfigError: An impossible setting.
    """

    needs_labels: ClassVar[bool] = False

    steps: int = 10
    lr: float = 1.0
    final_lr: float = 1e-3
    optimizer: Optimizer = "adam"
    core: int | None = 20
    objective: Objective = "answer"
    temperature: float = 1.0
    aggregate: Aggregate = "mean"
    trim: float = 0.25
    limit: int = 64
    parameter: Mode = "set"
    hard: bool = False
    keep: Literal["last", "best"] = "last"
    trust: float | None = None

    def __post_init__(self) -> None:
        Rule(self.objective, self.temperature, self.aggregate, self.trim, self.limit)
        choices = {"optimizer": Optimizer, "parameter": Mode, "keep": Literal["last", "best"]}
        for key, allowed in choices.items():
            if getattr(self, key) not in get_args(allowed):
                raise ConfigError(
                    f"{key}={getattr(self, key)!r} is none of {', '.join(get_args(allowed))}"
                )
        for key, least in (("steps", 0), ("lr", 0), ("final_lr", 0), ("core", 1)):
            value = getattr(self, key)
            if value is not None and not value >= least:
                raise ConfigError(f"{key}={value}: it must be at least {least}")
        if self.trust is not None and not self.trust > 0:
            raise ConfigError(f"trust={self.trust}: it must be above 0; steps=0 keeps the base")

    @property
    def name(self) -> str:
        """`ngd`."""
        return "ngd"

    @property
    def mode(self) -> Mode:
        """Of the pathways that it returns."""
        return self.parameter

    def solve(self, problem: Problem, progress: Progress = quiet) -> Solution:
        """Descend on the losses of the neighbors; see `Method`."""
        return self.descend_on(self.surrogate(problem), problem, progress)

    def surrogate(
        self, problem: Problem, probes: Sequence[Probe] | None = None, *, keep: bool = True
    ) -> Surrogate:
        """Of these probes, or of the problem's neighbors, with these settings; see `Surrogate`."""
        return Surrogate(
            problem, probes, objective=self.objective, temperature=self.temperature,
            aggregate=self.aggregate, trim=self.trim, limit=self.limit,
            width=self.width(problem), mode=self.parameter, keep=keep,
        )  # fmt: skip

    def width(self, problem: Problem) -> int:
        """Experts that a decision token calls while descending.

        Raises:
            ConfigError: The core is smaller than the router's top K.
        """
        top_k, experts = hard_width(problem.pathways), problem.start.shape[-1]
        if self.core is not None and self.core < top_k:
            raise ConfigError(
                f"core={self.core}: the router chooses {top_k} experts, more than that"
            )
        return top_k if self.hard else min(self.core or experts, experts)

    def descend_on(
        self, surrogate: Surrogate, problem: Problem, progress: Progress = quiet,
        free: Tensor | None = None,
    ) -> Solution:  # fmt: skip
        """Descend on any surrogate of this problem's samples.

        Args:
            surrogate: Made by `self.surrogate`.
            problem: Whose starts are taken.
            progress: Told each step.
            free: (B, 1, L, 1) bool: sites that may move; all by default.
        """
        trail = self.trail(surrogate, problem, progress, free)
        last = torch.full((len(problem.start),), len(trail.values) - 1)
        best = earliest_best(trail.losses).cpu()
        step = best if self.keep == "best" else last
        return settle(trail, step, problem, self.parameter, self.core)

    def trail(
        self, landscape: Landscape, problem: Problem, progress: Progress = quiet,
        free: Tensor | None = None,
    ) -> Trail:  # fmt: skip
        """The whole way down; arguments as in `descend_on`."""
        start, movable = begin(problem.start, self.core, self.parameter)
        movable = movable if free is None else movable & free.to(movable.device)
        values, mover = start, Mover(self.optimizer)
        way, seen = [start], []
        for step in range(self.steps):
            found = landscape.evaluate(values, gradient=True)
            assert found.gradient is not None
            seen.append(found)
            rate = cosine(step, self.steps, self.lr, self.final_lr)
            values = self._step(values, found, mover, rate, movable, problem.start)
            way.append(values)
            progress("descent", step + 1, self.steps)
        seen.append(landscape.evaluate(values))
        return Trail(
            way, torch.stack([one.losses for one in seen]),
            torch.stack([one.per_neighbor for one in seen]),
        )  # fmt: skip

    def _step(
        self, values: Tensor, found: Evaluation, mover: Mover, rate: float, movable: Tensor,
        start: Tensor,
    ) -> Tensor:  # fmt: skip
        gradient = found.gradient
        assert gradient is not None
        sound = found.losses.isfinite() & gradient.isfinite().flatten(1).all(1)
        gradient = torch.where(movable & sound.view(-1, 1, 1, 1), gradient, 0.0)
        move = torch.where(sound.view(-1, 1, 1, 1), mover.move(gradient, rate), 0.0)
        moved = values + move
        return moved if self.trust is None else project(moved, start, self.trust, self.parameter)


def begin(start_BDLE: Tensor, core: int | None, mode: Mode) -> tuple[Tensor, Tensor]:
    """Where a descent starts, and which entries may move.

    Args:
        start_BDLE: (B, D, L, E) the base's logits.
        core: How many experts are in the core; None for all.
        mode: `set`: the start is the base on its core, minus infinity outside. `add`: it is 0 in
            (B, 1, L, E), and what is outside the cores of all decision tokens cannot move.
    """
    inside = start_BDLE.isfinite()
    if core is not None and core < start_BDLE.shape[-1]:
        chosen = torch.zeros_like(inside).scatter(-1, start_BDLE.topk(core, dim=-1).indices, True)
        inside &= chosen
    if mode == "add":
        inside = inside.any(1, keepdim=True)
        return torch.zeros_like(start_BDLE[:, :1]), inside
    return start_BDLE.where(inside, float("-inf")), inside


def settle(
    trail: Trail, step_B: Tensor, problem: Problem, mode: Mode, core: int | None
) -> Solution:
    """The solution at one step of each sample, with so many core experts.

    A sample without probes, or whose loss is not a number there, keeps the base's routing.
    """
    rows = torch.arange(len(step_B))
    sound = trail.losses.cpu()[step_B, rows].isfinite()
    diverged = trail.losses.cpu()[0].isfinite() & ~sound
    values = trail.at(step_B * sound)
    changed = (values != trail.values[0]).flatten(1).any(1)
    base = torch.zeros_like(values) if mode == "add" else problem.start
    values = torch.where(changed.view(-1, 1, 1, 1), values, base)
    notes = {
        "step": step_B * sound,
        "kl": divergence(values, problem.start, mode),
        "diverged": diverged,
    }
    return Solution(values, mode, changed, trail.losses, core, notes=notes)


def hard_width(pathways: Pathways) -> int:
    """K: how many experts the routers choose, the most of all sites."""
    return max(info.top_k for info in pathways.sites)
