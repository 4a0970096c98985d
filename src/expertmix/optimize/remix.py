"""Re-mixing: samples in, better routing for each of them out.

Batch by batch: a plain pass, embeddings, neighbors, the gate, the method, and an evaluation of
what it found, dense and hard. Samples of a batch do not influence each other.

Knows the stages; how a method works and what a model is, others know.

Legend: B samples of a batch, O options, W tokens, D decision tokens, L critical sites, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expertmix.core.intervention import InOrder
from expertmix.core.pathway import Pathway, Pathways
from expertmix.core.progress import Progress, quiet
from expertmix.core.site import SiteInfo
from expertmix.errors import ConfigError
from expertmix.optimize.gate import NO_GATE, Gate, Keeper
from expertmix.optimize.item import Clock, Item
from expertmix.optimize.neighbors import NEAREST, Finder, Neighbors
from expertmix.optimize.outcome import Outcome
from expertmix.optimize.problem import Method, Problem, Solution
from expertmix.optimize.reference import ReferenceSet
from expertmix.optimize.replayed import intervention
from expertmix.optimize.samples import Sample, scores
from expertmix.optimize.start import start


@dataclass(frozen=True, eq=False)
class Remix:
    """What became of all samples.

    Attributes:
        outcomes: One per sample, in the order of the samples.
        sites: The L critical sites.
        decisions: D.
        scored: Whether the options' tokens were decision tokens too.
    """

    outcomes: Sequence[Outcome]
    sites: Sequence[SiteInfo]
    decisions: int = 1
    scored: bool = False

    def __len__(self) -> int:
        return len(self.outcomes)

    @property
    def seconds(self) -> Mapping[str, float]:
        """Per stage, of all samples together."""
        total: dict[str, float] = {}
        for outcome in self.outcomes:
            for stage, seconds in outcome.seconds.items():
                total[stage] = total.get(stage, 0.0) + seconds
        return total

    def intervention(
        self,
        samples: Sequence[int] | None = None,
        *,
        options: bool = False,
        rows: Sequence[Sequence[int]] | None = None,
        new_tokens: int = 0,
    ) -> InOrder:
        """The routing that was found, as an intervention that `record` applies (hard top K).

        By default for a batch whose rows are the prompts, to be generated from: positions count
        back from the end of the prompt. With `options`, for a batch whose rows are prompts with an
        option behind them: positions count from the start, since such a row is read as one prompt.
        Samples whose routing was not changed are not edited.

        Args:
            samples: Numbers of outcomes, in the order of the batch; all by default.
            options: Whether rows hold an option behind the prompt.
            rows: Per sample the rows of the batch that hold it: one, or with `options` one per
                option. By default they follow each other.
            new_tokens: Where the options' tokens were decision tokens too: how many generated
                tokens get the routing of the last prompt token as well.

        Raises:
            ConfigError: Rows that do not fit the samples.
        """
        chosen = self.outcomes if samples is None else [self.outcomes[one] for one in samples]
        return intervention(
            chosen, self.sites, decisions=self.decisions, scored=self.scored, options=options,
            rows=rows, new_tokens=new_tokens,
        )  # fmt: skip


def remix(
    pathways: Pathways,
    samples: Sequence[Sample],
    reference: ReferenceSet,
    method: Method,
    *,
    neighbors: Neighbors = NEAREST,
    gate: Gate = NO_GATE,
    batch_size: int = 16,
    embeddings: Tensor | None = None,
    progress: Progress = quiet,
) -> Remix:
    """Better routing for each sample; arguments and errors as of `outcomes`."""
    found = outcomes(
        pathways, samples, reference, method, neighbors=neighbors, gate=gate,
        batch_size=batch_size, embeddings=embeddings, progress=progress,
    )  # fmt: skip
    ordered = sorted(found, key=lambda one: one.number)
    return Remix(ordered, tuple(pathways.sites), pathways.decisions, pathways.scored)


def outcomes(
    pathways: Pathways,
    samples: Sequence[Sample],
    reference: ReferenceSet,
    method: Method,
    *,
    neighbors: Neighbors = NEAREST,
    gate: Gate = NO_GATE,
    batch_size: int = 16,
    embeddings: Tensor | None = None,
    progress: Progress = quiet,
) -> Iterator[Outcome]:
    """Outcomes as they come, batch by batch, shortest samples first: for callers that store them.

    A sample keeps the base's routing, and its outcome says why, when its plain pass or its loss is
    not finite, when it has no neighbors (and the method needs them), or when the gate refuses it.

    Args:
        pathways: The model, open.
        samples: What is to be answered.
        reference: Of the same model and critical sites.
        method: Finds the pathways.
        neighbors: Which references speak for a sample.
        gate: Which samples are adapted at all.
        batch_size: Samples that are worked on together.
        embeddings: (len(samples), H) given embeddings, where the references' were given.
        progress: Told how many samples are done.

    Raises:
        FingerprintError: A reference set of another model.
        ConfigError: Of other critical sites or decision tokens; embeddings that do not fit; a
            method that shifts logits, with pathways that were not opened for shifts.
        MissingDependencyError: An embedding or a backend that is not installed.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size}: it must be at least 1")
    if embeddings is not None and len(embeddings) != len(samples):
        raise ConfigError(f"{len(embeddings)} embeddings for {len(samples)} samples")
    if method.mode == "add" and not pathways.shift:
        raise ConfigError(
            f"the method {method.name} shifts the router's own logits: open the pathways with "
            f"shift=True"
        )
    return _Run(
        pathways, samples, reference.bound(pathways), method, neighbors, gate, embeddings
    ).outcomes(batch_size, progress)


class _Run:
    """One run over samples."""

    def __init__(
        self,
        pathways: Pathways,
        samples: Sequence[Sample],
        reference: ReferenceSet,
        method: Method,
        neighbors: Neighbors,
        gate: Gate,
        embeddings: Tensor | None,
    ) -> None:
        self.pathways, self.samples, self.reference = pathways, samples, reference
        self.method, self.embeddings = method, embeddings
        self.finder = Finder(reference, neighbors)
        self.keeper = Keeper(gate, self.finder)

    def outcomes(self, batch_size: int, progress: Progress) -> Iterator[Outcome]:
        order = sorted(range(len(self.samples)), key=self._length)
        for at in range(0, len(order), batch_size):
            numbers = order[at : at + batch_size]
            yield from self._batch(numbers)
            progress("remixing", at + len(numbers), len(order))

    def _length(self, number: int) -> tuple[int, int]:
        question = self.samples[number].question
        return len(question.prompt), sum(map(len, question.options))

    def _batch(self, numbers: Sequence[int]) -> list[Outcome]:
        clock = Clock(len(numbers))
        with clock("read"):
            readings = self.pathways.read([self.samples[one].question for one in numbers])
        batch = [Item(number, self.samples[number], one)
                 for number, one in zip(numbers, readings, strict=True)]  # fmt: skip
        readable = [item for item in batch if item.readable]
        if readable:
            self._solve(readable, clock)
        return [self._outcome(item, clock.seconds) for item in batch]

    def _solve(self, batch: Sequence[Item], clock: Clock) -> None:
        values, mass = start(
            [item.reading for item in batch], self.pathways.sites, decisions=self.pathways.decisions
        )
        with clock("neighbors"):
            found = self.finder.find(self._embed(batch), [item.sample for item in batch])
            reasons = self.keeper.reasons([item.base for item in batch], found)
        for row, item in enumerate(batch):
            item.start, item.mass = values[row], mass[row]
            item.neighbors, item.reason = found.rows([row]), reasons[row]
        kept = [row for row, reason in enumerate(reasons) if not reason]
        if not kept:
            return
        picked = found.rows(kept)
        with clock("states"):
            self.reference.prefetch(sorted(set(picked.indices[picked.present].tolist())))
        with clock("solve"):
            chosen = [batch[row] for row in kept]
            problem = Problem(
                self.pathways, [item.sample for item in chosen], [item.reading for item in chosen],
                values[kept], mass[kept], picked, self.finder,
            )  # fmt: skip
            solution = self.method.solve(problem)
        for row, item in enumerate(chosen):
            item.take(solution, row)
        with clock("evaluate"):
            self._evaluate([item for item in chosen if item.values is not None], solution)

    def _embed(self, batch: Sequence[Item]) -> Tensor:
        if self.embeddings is not None:
            return self.embeddings[[item.number for item in batch]].detach().float().cpu()
        return self.reference.embed(
            [item.reading for item in batch], [item.sample for item in batch]
        )

    def _evaluate(self, batch: Sequence[Item], solution: Solution) -> None:
        """Score what was found; what has no finite scores keeps the base's routing."""
        if not batch:
            return
        made = self.pathways.batch(
            [item.sample.question for item in batch], [item.reading.state for item in batch]
        )
        values = torch.stack([item.found for item in batch])
        mass = torch.stack([item.mass for item in batch if item.mass is not None])
        values = values.expand(-1, mass.shape[1], -1, -1)
        core = min(solution.core or values.shape[-1], int(values.isfinite().sum(-1).max()))
        hard = max(info.top_k for info in self.pathways.sites)
        samples = [item.sample for item in batch]
        with torch.no_grad():
            dense_BO, hard_BO = (
                scores(
                    self.pathways.score(made, Pathway(values, mass, width, solution.mode)),
                    samples,
                ).cpu()
                for width in (max(core, hard), hard)
            )
        for row, item in enumerate(batch):
            item.score(dense_BO[row], hard_BO[row])

    def _outcome(self, item: Item, seconds: Mapping[str, float]) -> Outcome:
        changed = item.values is not None
        L, E = len(self.pathways.sites), max(info.num_experts for info in self.pathways.sites)
        D = self.pathways.decisions
        return Outcome(
            item.number, item.sample, item.base,
            item.dense if changed else item.base, item.hard if changed else item.base,
            changed, item.reason,
            torch.full((D, L, E), torch.nan) if item.start is None else item.start,
            torch.full((D, L), torch.nan) if item.mass is None else item.mass,
            item.values, item.mode or self.method.mode, item.neighbors, item.losses, item.notes,
            dict(seconds),
        )  # fmt: skip
