"""A label-free surrogate: routing that makes the prompt itself likelier.

Knows the prompt's tokens only: no labels, no neighbors, no reference set.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Tensor

from expertmix.core.pathway import Mode, Pathways, Question
from expertmix.core.progress import Progress, quiet
from expertmix.errors import ConfigError
from expertmix.optimize.descent import NGD
from expertmix.optimize.probes import Probe
from expertmix.optimize.problem import Problem, Solution
from expertmix.optimize.samples import Sample

TOO_SHORT = "the prompt is too short to be split"


@dataclass(frozen=True)
class ContextLoss:
    """Rewiring experts on the fly (arXiv 2510.14853): δ ← δ − λ∇ of the context's own loss.

    δ is a logit vector per layer that is added to what the router gives; its loss is the next-token
    loss of the prompt, L(δ) = −Σ_t log p(x_{t+1} | x_{≤t}, δ) / T.

    A prompt is asked as a question about itself: its first part is the prompt, the rest the one
    option. Where pathways act on scored tokens, one question says it all: δ acts on every token
    from `split` on, as in the paper. Where they act on the last prompt token alone, δ is placed at
    one token per question, so `cuts` questions are asked, and each lets δ act at one place and
    counts what follows it. Then δ is used at the sample's own decision tokens.

    Costs a plain pass over these questions, and as many steps over tails as long as prompts: much
    more than NGD, whose tails are options.

    Attributes:
        descent: How; its `parameter` is always `add`.
        split: Tokens of the first part: 1 is all but the first token.
        cuts: Questions per prompt where only one token can be shifted, evenly from `split` on.
        horizon: Tokens that are counted behind a cut, at most; None for all.

    Raises:
        ConfigError: An impossible setting; the objective `choice`, for a prompt has no options.
    """

    needs_labels: ClassVar[bool] = False

    descent: NGD = field(default_factory=lambda: NGD(core=None))
    split: int = 1
    cuts: int = 4
    horizon: int | None = None

    def __post_init__(self) -> None:
        for key in ("split", "cuts", "horizon"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ConfigError(f"{key}={value}: it must be at least 1")
        if self.descent.objective != "answer":
            raise ConfigError("the context loss has no options to choose from: objective=answer")

    @property
    def name(self) -> str:
        """`context`."""
        return "context"

    @property
    def mode(self) -> Mode:
        """Live logits are shifted."""
        return "add"

    def solve(self, problem: Problem, progress: Progress = quiet) -> Solution:
        """See `Method`. A prompt that is too short to be split keeps the base's routing."""
        descent = replace(self.descent, parameter="add")
        probes = list(self._probes(problem))
        found = descent.descend_on(descent.surrogate(problem, probes), problem, progress)
        asked = {probe.owner for probe in probes}
        reasons = ["" if row in asked else TOO_SHORT for row in range(len(problem.samples))]
        return replace(found, reasons=reasons)

    def questions(self, prompt: tuple[int, ...], *, scored: bool) -> list[Question]:
        """What a prompt is asked about itself.

        Args:
            prompt: Token ids.
            scored: Whether pathways act on scored tokens.
        """
        room = len(prompt) - self.split
        count = min(1 if scored else self.cuts, max(0, room))
        starts = [self.split + room * number // count for number in range(count)]
        ends = [None if self.horizon is None else start + self.horizon for start in starts]
        return [
            Question(prompt[:start], (prompt[start:end],))
            for start, end in zip(starts, ends, strict=True)
        ]

    def _probes(self, problem: Problem) -> Iterator[Probe]:
        pathways = problem.pathways
        asked = [
            (row, slot, question)
            for row, sample in enumerate(problem.samples)
            for slot, question in enumerate(
                self.questions(sample.question.prompt, scored=pathways.scored)
            )
        ]
        states = _states(pathways, [question for *_, question in asked], self.descent.limit)
        for (row, slot, question), state in zip(asked, states, strict=True):
            weight = float(len(question.options[0]))  # of its mean loss per token
            yield Probe(row, slot, weight, Sample(question, 0), state)


def _states(
    pathways: Pathways, questions: list[Question], limit: int
) -> Iterator[Mapping[str, Tensor]]:
    for start in range(0, len(questions), limit):
        for reading in pathways.read(questions[start : start + limit]):
            yield reading.state
