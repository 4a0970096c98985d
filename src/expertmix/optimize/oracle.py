"""What routing could do at most: descent on a sample's own label, right or wrong.

C3PO (arXiv 2504.07964), oracle: L(ω) = ℓ(f(x, ω), y). It is an upper bound and not a method, for
it needs the label. The wrong-label oracle is its control: if ω can be pushed to any option as well,
what the oracle gains is that routing can be steered, not that it was wrong.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from expertmix.core.pathway import Mode
from expertmix.core.progress import Progress, quiet
from expertmix.errors import ConfigError
from expertmix.optimize.descent import NGD
from expertmix.optimize.probes import label_probes
from expertmix.optimize.problem import Problem, Solution
from expertmix.optimize.samples import Sample


@dataclass(frozen=True)
class Oracle:
    """Descent on the sample's own right option.

    Attributes:
        descent: How; its aggregate has nothing to do.
    """

    needs_labels: ClassVar[bool] = True

    descent: NGD = field(default_factory=NGD)

    @property
    def name(self) -> str:
        """`oracle`."""
        return "oracle"

    @property
    def mode(self) -> Mode:
        """Of the pathways that it returns."""
        return self.descent.mode

    def solve(self, problem: Problem, progress: Progress = quiet) -> Solution:
        """See `Method`.

        Raises:
            ConfigError: A sample has no right option.
        """
        targets = [_gold(sample) for sample in problem.samples]
        return _toward(self.descent, problem, targets, progress)


@dataclass(frozen=True)
class WrongOracle:
    """Descent on a wrong option of the sample, drawn by its item (see `Sample`) and a seed.

    What is drawn is how many places behind the right option it stands, round the end. So a sample
    draws the same alone and in any batch, and in every cyclic order of an item's options the same
    option is pushed. A sample of a single option has no wrong one, and keeps the base's routing.
    The option that was pushed is noted as `target`, -1 for none.

    Attributes:
        descent: How; its aggregate has nothing to do.
        seed: Of the draw.
    """

    needs_labels: ClassVar[bool] = True

    descent: NGD = field(default_factory=NGD)
    seed: int = 0

    @property
    def name(self) -> str:
        """`wrong_oracle`."""
        return "wrong_oracle"

    @property
    def mode(self) -> Mode:
        """Of the pathways that it returns."""
        return self.descent.mode

    def solve(self, problem: Problem, progress: Progress = quiet) -> Solution:
        """See `Method`.

        Raises:
            ConfigError: A sample has no right option.
        """
        targets = [self.target(sample) for sample in problem.samples]
        return _toward(self.descent, problem, targets, progress)

    def target(self, sample: Sample) -> int | None:
        """The wrong option that is pushed, None where all are right.

        Raises:
            ConfigError: The sample has no right option.
        """
        gold, count = _gold(sample), len(sample.question.options)
        if count == 1:
            return None
        item = sample.item or str(sample.question)
        drawn = hashlib.sha256(f"{self.seed} {item}".encode()).digest()
        behind = 1 + int.from_bytes(drawn[:8], "big") % (count - 1)
        return (gold + behind) % count


def _gold(sample: Sample) -> int:
    if sample.gold is None:
        raise ConfigError(
            f"sample {sample.name!r} has no right option: an oracle needs the labels of the test "
            f"samples; use a method that needs none, such as ngd"
        )
    return sample.gold


def _toward(
    descent: NGD, problem: Problem, targets: Sequence[int | None], progress: Progress
) -> Solution:
    surrogate = descent.surrogate(problem, label_probes(problem, targets))
    found = descent.descend_on(surrogate, problem, progress)
    aimed = torch.tensor([-1 if target is None else target for target in targets])
    reasons = ["no option to push" if target is None else "" for target in targets]
    return replace(found, reasons=reasons, notes={**found.notes, "target": aimed})
