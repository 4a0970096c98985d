"""An open model that remembers its plain passes over a task: `remembering`.

Every contestant needs the same plain pass over the same questions, so a run reads them once. A
batch is remembered whole or not at all, and under all of its questions: what a text gives differs
by rounding with the company in which it is read, so results are the same, bit for bit, with and
without memory, and in a run that goes on after a kill.

Knows no contestant.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from expertmix.core.pathway import Pathway, Pathways, Question, Reading, TunableRouters
from expertmix.core.site import SiteInfo

BUDGET = 1 << 30
"""Bytes that are remembered."""


class Remembered:
    """Pathways whose plain passes over some questions are done once; see `remembering`.

    Args:
        pathways: The model, open.
        questions: Whose readings are worth keeping.
        budget: Bytes to keep; what comes later is read again each time.
    """

    def __init__(
        self, pathways: Pathways, questions: Iterable[Question], budget: int = BUDGET
    ) -> None:
        self._pathways, self._wanted = pathways, frozenset(questions)
        self._room = budget
        self._kept: dict[tuple[Question, ...], list[Reading]] = {}
        self._seconds: dict[Question, float] = {}

    @property
    def sites(self) -> Sequence[SiteInfo]:
        """The critical sites."""
        return self._pathways.sites

    @property
    def decisions(self) -> int:
        """How many tokens of a prompt's end are decision tokens."""
        return self._pathways.decisions

    @property
    def scored(self) -> bool:
        """Whether the options' tokens are decision tokens too."""
        return self._pathways.scored

    @property
    def shift(self) -> bool:
        """Whether pathways of mode `add` may come."""
        return self._pathways.shift

    @property
    def exact(self) -> bool:
        """Whether only what a pathway can change is computed again."""
        return self._pathways.exact

    @property
    def notice(self) -> str | None:
        """What a user should be told."""
        return self._pathways.notice

    def fingerprint(self) -> str:
        """Of the model."""
        return self._pathways.fingerprint()

    def read(self, questions: Sequence[Question]) -> list[Reading]:
        """One plain pass, or what the same pass gave before."""
        batch = tuple(questions)
        if batch in self._kept:
            return list(self._kept[batch])
        begin = time.perf_counter()
        readings = self._pathways.read(questions)
        if self._wanted.issuperset(batch):
            share = (time.perf_counter() - begin) / max(1, len(batch))
            self._seconds.update(dict.fromkeys(batch, share))
            self._keep(batch, readings)
        return readings

    def seconds(self, question: Question) -> float:
        """What reading a question cost when it was last read: its share of its batch's pass.

        Args:
            question: One that was read.
        """
        return self._seconds[question]

    def batch(
        self,
        questions: Sequence[Question],
        states: Sequence[Mapping[str, Tensor]],
        *,
        only: Sequence[int] | None = None,
    ) -> object:
        """See `Pathways`."""
        return self._pathways.batch(questions, states, only=only)

    def score(self, batch: object, pathway: Pathway | None) -> Tensor:
        """See `Pathways`."""
        return self._pathways.score(batch, pathway)

    def _keep(self, batch: tuple[Question, ...], readings: Sequence[Reading]) -> None:
        size = sum(map(_bytes, readings))
        if size <= self._room:
            self._room -= size
            self._kept[batch] = list(readings)


class RememberedRouters(Remembered):
    """The same of a model whose critical routers can be trained; see `core.TunableRouters`."""

    def __init__(
        self, pathways: TunableRouters, questions: Iterable[Question], budget: int = BUDGET
    ) -> None:
        super().__init__(pathways, questions, budget)
        self._routers = pathways

    def gates(self) -> Sequence[Tensor]:
        """See `TunableRouters`."""
        return self._routers.gates()

    def routed(self, batch: object) -> Tensor:
        """See `TunableRouters`."""
        return self._routers.routed(batch)


def remembering(
    pathways: Pathways, questions: Iterable[Question], budget: int = BUDGET
) -> Remembered:
    """Pathways that remember; they can do what these can. Arguments as of `Remembered`."""
    if isinstance(pathways, TunableRouters):
        return RememberedRouters(pathways, questions, budget)
    return Remembered(pathways, questions, budget)


def _bytes(reading: Reading) -> int:
    parts = (
        reading.logprobs, reading.last, reading.mean, reading.logits, reading.indices,
        reading.weights, *reading.state.values(),
    )  # fmt: skip
    return sum(part.untyped_storage().nbytes() for part in parts)
