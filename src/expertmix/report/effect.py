"""What an intervention did to the task: `Effect`, given to a report as data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Effect:
    """One number before and after an intervention.

    Attributes:
        intervention: What was done, for a reader: `ablate python`.
        label: On which text, such as a domain.
        base: The metric without the intervention.
        value: The metric with it.
        metric: Name of the metric, with its unit where it has one.
        kind: Interventions of one kind stand in one table, such as `ablate` and `mask`.
        higher_is_better: Whether a larger metric is a better one.
    """

    intervention: str
    label: str
    base: float
    value: float
    metric: str = "loss"
    kind: str = ""
    higher_is_better: bool = False

    @property
    def delta(self) -> float:
        """Value minus base, in the metric's unit."""
        return self.value - self.base

    @property
    def harm(self) -> float:
        """The change for the worse: positive when the intervention hurts."""
        return -self.delta if self.higher_is_better else self.delta
