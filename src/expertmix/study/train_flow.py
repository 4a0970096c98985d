"""What happens between the steps of a run, as a callback of Trainer: `Flow`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from expertmix.study.train_rhythm import Rhythm


class Flow(TrainerCallback):
    """Says when to log, evaluate and save; moves biases; takes the time of steps alone.

    Args:
        rhythm: When what is due.
        with_weights: Called when the weights move.
        moved: Told each step that was made.
        validates: Whether there is something to validate on.
    """

    def __init__(
        self,
        rhythm: Rhythm,
        with_weights: Callable[[], None],
        moved: Callable[[int], None],
        *,
        validates: bool,
    ) -> None:
        self._rhythm = rhythm
        self._with_weights = with_weights
        self._moved = moved
        self._validates = validates
        self._began = 0.0
        self._seconds = 0.0
        self._steps = 0

    def lap(self) -> tuple[int, float]:
        """Steps since the last lap, and the seconds that they took; begins a new one."""
        found = (self._steps, self._seconds)
        self._steps, self._seconds = 0, 0.0
        return found

    def on_step_begin(self, *given: Any, **context: Any) -> None:
        """The clock runs."""
        self._began = time.perf_counter()

    def on_optimizer_step(self, *given: Any, **context: Any) -> None:
        """The weights move."""
        self._with_weights()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **context: Any,
    ) -> None:
        """What is due now."""
        self._seconds += time.perf_counter() - self._began
        self._steps += 1
        self._moved(state.global_step)
        control.should_log = self._rhythm.logs(state.global_step)
        control.should_evaluate = self._validates and self._rhythm.evaluates(state.global_step)
        control.should_save = self._rhythm.saves(state.global_step)
