"""Probes: questions whose loss says how good a pathway is, and for whose pathway they speak.

The neighbors of a test sample are its probes; an oracle's probe is the sample itself. Knows which
question is asked for whom, and which are best asked together; runs nothing.

Legend: B test samples, k probes of one sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from expertmix.errors import ConfigError
from expertmix.optimize.problem import Problem
from expertmix.optimize.samples import Sample

if TYPE_CHECKING:
    from expertmix.optimize.reference import ReferenceSet

_COST_OF_A_PASS = 128  # tokens of padding, which call no experts, that cost as much as a pass


@dataclass(frozen=True, eq=False, slots=True)
class Probe:
    """A question that is asked with the pathway of its owner.

    Attributes:
        owner: Number of the test sample whose pathway it gets.
        slot: Its place among the probes of that sample.
        weight: Its kernel weight; at 0 it is asked, and counts nothing.
        sample: The question, and as `gold` the option that should become likely.
        state: What reading the question left.
    """

    owner: int
    slot: int
    weight: float
    sample: Sample
    state: Mapping[str, Tensor]

    @property
    def gold(self) -> int:
        """The option that should become likely.

        Raises:
            ConfigError: It is not known.
        """
        if self.sample.gold is None:
            raise ConfigError(
                f"sample {self.sample.name!r} has no right option, and a method that needs one "
                f"was asked to optimize with it"
            )
        return self.sample.gold


def neighbor_probes(reference: ReferenceSet, indices_Bk: Tensor, weights_Bk: Tensor) -> list[Probe]:
    """The neighbors of each sample; -1 is nobody."""
    reference.prefetch(sorted(set(indices_Bk[indices_Bk >= 0].tolist())))
    return [
        Probe(owner, slot, weight, reference.samples[index], reference.state(index))
        for owner, (indices, weights) in enumerate(
            zip(indices_Bk.tolist(), weights_Bk.tolist(), strict=True)
        )
        for slot, (index, weight) in enumerate(zip(indices, weights, strict=True))
        if index >= 0
    ]


def label_probes(problem: Problem, targets: Sequence[int | None]) -> list[Probe]:
    """Each sample asks itself, and `targets` are the options that should become likely."""
    return [
        Probe(row, 0, 1.0, replace(sample, gold=target), reading.state)
        for row, (sample, reading, target) in enumerate(
            zip(problem.samples, problem.readings, targets, strict=True)
        )
        if target is not None
    ]


def chunks(
    probes: Sequence[Probe], decisions: int, limit: int, *, gold_only: bool
) -> Iterator[list[int]]:
    """Numbers of the probes that are asked together: of about the same length, at most `limit`.

    A row is padded to the longest of its chunk, so a chunk ends where the padding that one more row
    would cost the others outweighs one more pass.
    """
    sizes = [_tail(probe, decisions, gold_only=gold_only) for probe in probes]
    order = sorted(
        range(len(probes)), key=lambda row: (sizes[row], len(probes[row].sample.question.prompt))
    )
    chunk: list[int] = []
    for row in order:
        padding = len(chunk) * (sizes[row] - sizes[chunk[-1]]) if chunk else 0
        if chunk and (len(chunk) == limit or padding > _COST_OF_A_PASS):
            yield chunk
            chunk = []
        chunk.append(row)
    if chunk:
        yield chunk


def _tail(probe: Probe, decisions: int, *, gold_only: bool) -> int:
    """Tokens that are computed again: the decision tokens, and what is read of the options."""
    options = probe.sample.question.options
    counted = [options[probe.gold]] if gold_only else options
    return decisions + sum(len(option) - 1 for option in counted)
