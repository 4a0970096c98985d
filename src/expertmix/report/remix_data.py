"""What a page about re-mixed routing is made of: a line per routing, and what became of each item.

Plain numbers, given by the caller. A control is a routing that should not help if a method helps
for its stated reason; a bound needs the right answer, so nobody could use it. Knows no model.

Legend: O options, L critical sites, E experts, T steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from expertmix.core.estimate import Estimate

Kind = Literal["base", "method", "rival", "control", "bound"]
LEVEL = 0.05
"""A p-value below it counts as shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RemixLine:
    """One routing over all items.

    Attributes:
        method: Its name.
        kind: What it stands for.
        items: How many.
        accuracy: Share of right items; nan where nothing is chosen.
        dense: The share with all experts that were used while optimizing.
        gained: Items that the base has wrong and this one right.
        lost: The other way round.
        p: McNemar's, against the base.
        p_holm: Corrected for the number of methods; nan of controls and bounds.
        loss: Mean loss in nats.
        change: Of it, against the base.
        gap: Share of the oracle's gain in right items; nan where there is none.
        milliseconds: Per item.
        relative: That over the base's own pass.
        changed: Items whose routing was changed.
        refused: Items that were left alone, by reason.
        of: Of a control, the method that it doubts; empty where it doubts all.
        doubted: Controls over which the gain of this method is not shown.
        settings: In words.
        shifts: Whether it adds to what the routers give, so that how its routing moved is exact at
            the first critical site only.
        stages: Milliseconds per item by stage; may hold less than all.
    """

    method: str
    kind: Kind
    items: int
    accuracy: Estimate
    loss: float
    change: Estimate
    milliseconds: float
    relative: float
    dense: float = math.nan
    gained: int = 0
    lost: int = 0
    p: float = math.nan
    p_holm: float = math.nan
    gap: float = math.nan
    changed: int = 0
    refused: Mapping[str, int] = field(default_factory=dict)
    of: str = ""
    doubted: tuple[str, ...] = ()
    settings: str = ""
    shifts: bool = False
    stages: Mapping[str, float] = field(default_factory=dict)

    @property
    def competes(self) -> bool:
        """Whether it claims anything."""
        return self.kind in ("method", "rival")

    @property
    def helps(self) -> bool:
        """Whether it is shown to get more items right."""
        return self.p_holm < LEVEL and self.gained > self.lost

    @property
    def harms(self) -> bool:
        """Whether it is shown to get fewer items right."""
        return self.p_holm < LEVEL and self.gained < self.lost


@dataclass(frozen=True, slots=True)
class Near:
    """A neighbor: its name, its similarity, and its share of the kernel's weight."""

    name: str
    similarity: float
    weight: float


@dataclass(frozen=True, slots=True)
class Move:
    """A pathway before and after, mean over the decision tokens.

    Attributes:
        before: Per site the base's weights, by expert; others have none.
        after: Per site the new ones.
        kl: Per site, Kullback-Leibler divergence in nats of the new distribution over all experts
            from the base's.
    """

    before: tuple[Mapping[int, float], ...]
    after: tuple[Mapping[int, float], ...]
    kl: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One order in which an item was asked.

    Attributes:
        neighbors: The nearest first.
        dropped: Near-duplicates among the references that were left out.
        losses: (T + 1,) the surrogate, where there is one.
        reason: Why the routing was left alone, if it was.
        move: How the pathway moved; None where it did not.
    """

    neighbors: tuple[Near, ...] = ()
    dropped: int = 0
    losses: tuple[float, ...] = ()
    reason: str = ""
    move: Move | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RemixItem:
    """One item under one routing; scores are means over the orders in which it was asked.

    Attributes:
        item: Its number.
        name: Its name.
        method: The routing's.
        label: Its group.
        gold: Number of the right option.
        base: (O,) scores under the base's routing.
        scores: (O,) under this one.
        dense: (O,) with all experts that were used while optimizing, or nothing.
        correct: Whether the right option has the best score; None where there is no choice.
        base_correct: The same of the base.
        loss: In nats.
        base_loss: The same of the base.
        turns: At least one.
    """

    item: int
    name: str
    method: str
    gold: int
    base: tuple[float, ...]
    scores: tuple[float, ...]
    correct: bool | None
    base_correct: bool | None
    loss: float
    base_loss: float
    label: str | None = None
    dense: tuple[float, ...] = ()
    turns: tuple[Turn, ...] = (Turn(),)

    @property
    def change(self) -> float:
        """In loss."""
        return self.loss - self.base_loss

    @property
    def alone(self) -> bool:
        """Its routing was left as it is, for a reason that is known."""
        unmoved = all(turn.move is None for turn in self.turns)
        return unmoved and any(turn.reason for turn in self.turns)

    @property
    def flip(self) -> Literal["gained", "lost", ""]:
        """Which way its answer flipped."""
        if self.correct == self.base_correct:
            return ""
        return "gained" if self.correct else "lost"
