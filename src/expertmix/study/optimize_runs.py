"""Contestants on the questions of a task: `Runner`, and `Scored`, what one of them did with one.

All are given the very same tokens. Questions are taken shortest first, in batches that depend on
nothing but the questions that are left; so when a run stops behind a batch, what is left makes the
batches that it would have made. Knows an open model and a reference set; writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from expertmix.core.pathway import Pathways, Reading
from expertmix.optimize.gate import Gate
from expertmix.optimize.item import Clock
from expertmix.optimize.neighborhood import Neighborhood
from expertmix.optimize.neighbors import Finder, Neighbors
from expertmix.optimize.outcome import Outcome, plain
from expertmix.optimize.reference import ReferenceSet
from expertmix.optimize.remix import outcomes
from expertmix.optimize.replayed import intervention
from expertmix.optimize.samples import Sample, scores
from expertmix.study.choice_prompts import Asked
from expertmix.study.contestants import Contestant
from expertmix.study.controls import vote, with_examples
from expertmix.study.optimize_moves import moved
from expertmix.study.remembered import BUDGET, remembering


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """One question under one contestant; lists over options are as they were shown.

    Attributes:
        number: Of the question, in all that the task asks.
        base: Scores under the base's routing.
        scores: Under the contestant's.
        dense: With all experts that were used while optimizing; empty where there is none.
        neighbors: Names of references, the nearest first.
        weights: Their kernel weights.
        similarity: Their similarity.
        losses: The surrogate before the first step and after each.
        changed: Whether the routing was changed.
        refused: Why not, where a reason is known.
        notes: More by name.
        seconds: Its share of the time of its batch.
        stages: That time by stage; `read` is the plain pass, which is in all of them.
        dropped: Near-duplicates among the references that were left out.
        moved: How its pathway moved, see `optimize_moves.moved`; None where it did not.
    """

    number: int
    base: list[float]
    scores: list[float]
    dense: list[float] = field(default_factory=list)
    neighbors: list[str] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    similarity: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    changed: bool = False
    refused: str = ""
    notes: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    stages: dict[str, float] = field(default_factory=dict, compare=False)
    dropped: int = 0
    moved: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Scored:
        """What `to_dict` made; further keys are ignored, those with a default may be missing."""
        return cls(**{name: found[name] for name in cls.__dataclass_fields__ if name in found})


@dataclass(frozen=True, eq=False, slots=True)
class Batch:
    """What came of one batch.

    Attributes:
        scored: Its questions.
        edits: Their pathways as an intervention on a batch of all prompts in the order in which the
            task asks them, JSON-ready; None where there is none.
    """

    scored: list[Scored]
    edits: dict[str, Any] | None = None


@dataclass(frozen=True, eq=False, slots=True)
class Examples:
    """How solved questions are put in front of one.

    Attributes:
        separator: Tokens between questions.
        begin: Tokens that begin every prompt.
        context: Tokens that the model reads.
    """

    separator: tuple[int, ...]
    begin: tuple[int, ...]
    context: int | None

    @classmethod
    def of(cls, tokenizer: Any, context: int | None) -> Examples:
        """As a tokenizer writes them: a blank line between questions."""
        whole, bare = (
            list(tokenizer("a", add_special_tokens=special)["input_ids"])
            for special in (True, False)
        )
        starts = [n for n in range(len(whole)) if whole[n : n + len(bare)] == bare]
        separator = tokenizer("\n\n", add_special_tokens=False)["input_ids"]
        return cls(tuple(separator), tuple(whole[: starts[0]] if starts else ()), context)


class Runner:
    """Runs contestants.

    Args:
        pathways: The model, open.
        reference: The references.
        asked: All questions of the task.
        neighbors: Who counts as a neighbor.
        gate: Which questions are left alone.
        examples: How solved questions are put in front of one.
        batch_size: Questions per batch.
        edits: Whether interventions are wanted.
        memory: Bytes of readings that are remembered, so that a question is read once and not once
            per contestant; all the same each contestant's time holds that reading's.
    """

    def __init__(
        self,
        pathways: Pathways,
        reference: ReferenceSet,
        asked: Sequence[Asked],
        *,
        neighbors: Neighbors,
        gate: Gate,
        examples: Examples,
        batch_size: int = 16,
        edits: bool = False,
        memory: int = BUDGET,
    ) -> None:
        self.pathways = remembering(pathways, [one.sample.question for one in asked], memory)
        self.reference, self.asked = reference, asked
        self.neighbors, self.gate, self.examples = neighbors, gate, examples
        self.batch_size, self.edits = batch_size, edits
        self._finder: Finder | None = None

    def run(self, contestant: Contestant, left: Sequence[int]) -> Iterator[Batch]:
        """The questions of these numbers, batch by batch."""
        if contestant.method is not None:
            yield from self._remixed(contestant, left)
            return
        order = sorted(left, key=self._length)
        for start in range(0, len(order), self.batch_size):
            yield Batch(self._unrouted(contestant, order[start : start + self.batch_size]))

    def _length(self, number: int) -> tuple[int, int]:
        question = self.asked[number].sample.question
        return len(question.prompt), sum(map(len, question.options))

    def _remixed(self, contestant: Contestant, left: Sequence[int]) -> Iterator[Batch]:
        assert contestant.method is not None
        reference, neighbors = self.reference, self.neighbors
        if contestant.twist == "shuffled labels":
            reference = reference.shuffled_labels(contestant.seed)
        if contestant.twist == "random neighbors":
            neighbors = neighbors.random(contestant.seed)
        samples = [self.asked[number].sample for number in left]
        batch: list[Outcome] = []
        for done, outcome in enumerate(
            outcomes(
                self.pathways, samples, reference, contestant.method, neighbors=neighbors,
                gate=self.gate, batch_size=self.batch_size,
            ),
            1,
        ):  # fmt: skip
            batch.append(outcome)
            if len(batch) == self.batch_size or done == len(left):
                yield self._batch(batch, left)
                batch = []

    def _batch(self, batch: Sequence[Outcome], left: Sequence[int]) -> Batch:
        numbers = [left[outcome.number] for outcome in batch]
        scored = [self._scored(one, number) for one, number in zip(batch, numbers, strict=True)]
        if not self.edits:
            return Batch(scored)
        edits = intervention(
            batch, self.pathways.sites, decisions=self.pathways.decisions,
            scored=self.pathways.scored, options=False, rows=[[number] for number in numbers],
        )  # fmt: skip
        return Batch(scored, edits.to_dict())

    @property
    def _width(self) -> int:
        return max(info.top_k for info in self.pathways.sites)

    def _scored(self, outcome: Outcome, number: int) -> Scored:
        dense = outcome.dense.tolist() if outcome.changed else []
        losses = [] if outcome.losses is None else outcome.losses.tolist()
        near, stages = outcome.neighbors, self._stages(outcome.sample, outcome.seconds)
        return Scored(
            number=number, base=outcome.base.tolist(), scores=outcome.hard.tolist(), dense=dense,
            losses=losses, changed=outcome.changed, refused=outcome.reason,
            notes=plain(dict(outcome.notes)), seconds=sum(stages.values()), stages=stages,
            moved=moved(outcome, self._width),
            **({} if near is None else self._named(near, 0)),
        )  # fmt: skip

    def _stages(self, sample: Sample, seconds: Mapping[str, float]) -> dict[str, float]:
        """A remembered reading costs what it cost."""
        return {**seconds, "read": self.pathways.seconds(sample.question)}

    def _unrouted(self, contestant: Contestant, numbers: Sequence[int]) -> list[Scored]:
        """The base, or a control that changes no routing."""
        samples = [self.asked[number].sample for number in numbers]
        readings, base = self._read(samples)
        clock = Clock(len(numbers))
        found: list[dict[str, Any]] = [{"scores": one} for one in base]
        if contestant.twist == "neighbor vote":
            found = self._voted(samples, readings, base, clock)
        elif contestant.twist:
            found = self._shown(samples, readings, clock)
        stages = [self._stages(sample, clock.seconds) for sample in samples]
        return [
            Scored(number=number, base=own, seconds=sum(spent.values()), stages=spent, **one)
            for number, own, spent, one in zip(numbers, base, stages, found, strict=True)
        ]

    def _read(self, samples: Sequence[Sample]) -> tuple[list[Reading], list[list[float]]]:
        readings = self.pathways.read([sample.question for sample in samples])
        return readings, [
            scores(reading.logprobs[None].cpu(), [sample])[0].tolist()
            for reading, sample in zip(readings, samples, strict=True)
        ]

    def _voted(
        self, samples: Sequence[Sample], readings: Sequence[Reading], base: list[list[float]],
        clock: Clock,
    ) -> list[dict[str, Any]]:  # fmt: skip
        with clock("neighbors"):
            near = self._near(readings, samples)
        named = [self._named(near, row) for row in range(len(base))]
        return [
            {"scores": vote(own, self._chosen(near, row), one["weights"]), **one}
            for row, (own, one) in enumerate(zip(base, named, strict=True))
        ]

    def _shown(
        self, samples: Sequence[Sample], readings: Sequence[Reading], clock: Clock
    ) -> list[dict[str, Any]]:
        with clock("neighbors"):
            near, how = self._near(readings, samples), self.examples
        longer = [
            with_examples(
                sample, self._chosen(near, row), separator=how.separator, begin=how.begin,
                context=how.context,
            )
            for row, sample in enumerate(samples)
        ]  # fmt: skip
        with clock("evaluate"):
            _, shown = self._read([sample for sample, _ in longer])
        return [
            {"scores": now, "notes": {"examples": used}, **self._named(near, row)}
            for row, (now, (_, used)) in enumerate(zip(shown, longer, strict=True))
        ]

    def _near(self, readings: Sequence[Reading], samples: Sequence[Sample]) -> Neighborhood:
        if self._finder is None:
            self._finder = Finder(self.reference, self.neighbors)
        return self._finder.find(self.reference.embed(readings, samples), samples)

    def _chosen(self, near: Neighborhood, row: int) -> list[Sample]:
        return [self.reference.samples[n] for n in near.indices[row].tolist() if n >= 0]

    def _named(self, near: Neighborhood, row: int) -> dict[str, Any]:
        there = near.present[row]
        return {
            "neighbors": [sample.name for sample in self._chosen(near, row)],
            "weights": near.weights[row][there].tolist(),
            "similarity": near.similarity[row][there].tolist(),
            "dropped": int(near.dropped[row]),
        }
