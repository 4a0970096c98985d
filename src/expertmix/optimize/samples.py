"""Questions with what is known of them: the right option, and how options are scored.

Knows token ids and log-probabilities; no model and no task.

Legend: B samples, O options, W tokens of the longest option.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expertmix.core.pathway import Question
from expertmix.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Sample:
    """A question, and what is known of it.

    Attributes:
        question: The prompt and its options, as token ids.
        gold: Number of the right option, or None where it is not known.
        units: Per option, what its log-probability is divided by: its characters or tokens for
            scores that do not favor short options. Empty: nothing is divided.
        name: Of the sample, in results.
        text: The prompt as text, for reports and the filter of near-duplicates; may be left out.
        item: What samples share that ask the same in other orders of the options; may be left out.
    """

    question: Question
    gold: int | None = None
    units: tuple[float, ...] = ()
    name: str = ""
    text: str | None = None
    item: str = ""

    def __post_init__(self) -> None:
        options = len(self.question.options)
        if self.gold is not None and not 0 <= self.gold < options:
            raise ConfigError(
                f"sample {self.name!r}: option {self.gold} is right, but it has {options}"
            )
        if self.units and (len(self.units) != options or min(self.units) <= 0):
            raise ConfigError(f"sample {self.name!r}: units need one number above 0 per option")


def scores(logprobs_BOW: Tensor, samples: Sequence[Sample]) -> Tensor:
    """(B, O) log-probability of each option, divided by its units; minus infinity beyond O."""
    units_BO = torch.ones(logprobs_BOW.shape[:2])
    missing_BO = torch.ones(logprobs_BOW.shape[:2], dtype=torch.bool)
    for row, sample in enumerate(samples):
        count = len(sample.question.options)
        missing_BO[row, :count] = False
        if sample.units:
            units_BO[row, :count] = torch.tensor(sample.units)
    return (logprobs_BOW.sum(-1) / units_BO.to(logprobs_BOW)).masked_fill(
        missing_BO.to(logprobs_BOW.device), float("-inf")
    )
