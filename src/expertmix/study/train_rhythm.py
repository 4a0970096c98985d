"""When a training run logs, evaluates and saves: `Rhythm`. Knows steps only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rhythm:
    """What happens after which steps.

    Attributes:
        steps: In all.
        log: Every so many; also where something is saved, so that a resumed run logs the same.
        evaluate, save: Every so many, or None. At the end there is an evaluation in any case.
        keep: Checkpoints to keep.
        tokens: Of one step.
        epoch: Tokens of one pass over the data.
    """

    steps: int
    log: int
    evaluate: int | None
    save: int | None
    keep: int
    tokens: int
    epoch: int

    def logs(self, step: int) -> bool:
        """Whether a line is due after this step."""
        return step % self.log == 0 or step == self.steps or self.saves(step)

    def evaluates(self, step: int) -> bool:
        """Whether an evaluation is."""
        return step == self.steps or (self.evaluate is not None and step % self.evaluate == 0)

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is."""
        return self.save is not None and step % self.save == 0
