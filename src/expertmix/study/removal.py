"""Each expert taken away, one after the other: `Removals`, and what is lost without it.

This is the only measure here that says whether an expert is needed. How often it is called is
counted elsewhere and says something else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from expertmix.core.intervention import Intervention
from expertmix.core.progress import Progress
from expertmix.core.removal import Ablate, Mask
from expertmix.report.effect import Effect
from expertmix.report.table import Cell, Table
from expertmix.study.corpus import Corpus
from expertmix.study.tracing import NOISE, Run, run

METRIC = "loss (nats per token)"
KINDS = ("ablate", "mask")
_NOTE = (
    "Growth of the loss in nats per token when the expert is taken away at every layer; larger is "
    "worse. Ablate: it is chosen, but its output is dropped and nobody steps in. Mask: it may not "
    "be chosen, and the router takes the next one. In a MoE made of one base model every expert "
    "also carries the base's own MLP: ablating drops that too, masking does not, so masking comes "
    "closer to what the expert's training is worth. Measured on {samples} of the texts ({tokens:,} "
    "tokens): few, so read differences of a few hundredths as none."
)


@dataclass(frozen=True, eq=False, slots=True)
class Removals:
    """Runs without one expert, and one with all of them, on the same text in the same batches.

    Attributes:
        experts: Names, in order.
        before: With all experts.
        runs: By kind (`ablate`, `mask`) and expert.
    """

    experts: tuple[str, ...]
    before: Run
    runs: Mapping[tuple[str, str], Run]

    def lost(self, kind: str, expert: str, domain: str) -> float:
        """By how much the loss on a domain grows without an expert, in nats per token."""
        return self.runs[kind, expert].loss(domain) - self.before.loss(domain)

    def effects(self) -> list[Effect]:
        """For a report: kind by kind, expert × domain."""
        return [
            Effect(
                f"{kind} {expert}",
                domain,
                self.before.loss(domain),
                self.runs[kind, expert].loss(domain),
                METRIC,
                kind,
            )
            for kind, expert in self.runs
            for domain in self.before.corpus.labels
        ]

    def table(self) -> Table:
        """What each expert's own domain and all other text lose without it."""
        return Table(
            title="What is lost without each expert",
            columns=(
                "expert",
                "ablate: own domain",
                "ablate: other text",
                "mask: own domain",
                "mask: other text",
            ),
            rows=tuple(self._row(expert) for expert in self.experts),
            headline=self._headline(),
            note=_NOTE.format(samples=len(self.before.corpus), tokens=self.before.corpus.tokens),
        )

    def _row(self, expert: str) -> tuple[Cell, ...]:
        cells: list[Cell] = [expert]
        for kind in KINDS:
            own = self.lost(kind, expert, expert) if expert in self._domains else None
            cells += [own, self._others(kind, expert)]
        return tuple(cells)

    @property
    def _domains(self) -> tuple[str, ...]:
        return self.before.corpus.labels

    def _others(self, kind: str, expert: str) -> float:
        """Mean over the other domains, each counting the same."""
        lost = [self.lost(kind, expert, domain) for domain in self._domains if domain != expert]
        return sum(lost) / len(lost)

    def _headline(self) -> str:
        owned = [expert for expert in self.experts if expert in self._domains]
        masked, ablated = (self._missed_at_home(kind, owned) for kind in ("mask", "ablate"))
        most = max(owned, key=lambda expert: self.lost("mask", expert, expert))
        return (
            f"Masking an expert clearly costs its own domain more than other text for {masked} of "
            f"{len(owned)} experts (most for `{most}`: {self.lost('mask', most, most):+.2f}); "
            f"ablating it, for {ablated}."
        )

    def _missed_at_home(self, kind: str, owned: list[str]) -> int:
        return sum(self.lost(kind, name, name) - self._others(kind, name) > NOISE for name in owned)


def remove_each(
    moe: Any, corpus: Corpus, experts: tuple[str, ...], *, progress: Progress
) -> Removals:
    """Read a corpus with all experts, then without each of them, ablated and masked.

    Args:
        moe: The MoE.
        corpus: Labeled.
        experts: Names of its experts, in order.
        progress: Told the runs that are done.
    """
    edits = {
        (kind, name): _removal(kind, number)
        for kind in KINDS
        for number, name in enumerate(experts)
    }
    progress("removing experts", 0, len(edits))
    before = run(moe, corpus, by_length=True)
    runs: dict[tuple[str, str], Run] = {}
    for key, edit in edits.items():
        runs[key] = run(moe, corpus, edit, by_length=True)
        progress("removing experts", len(runs), len(edits))
    return Removals(experts, before, runs)


def _removal(kind: str, expert: int) -> Intervention:
    return Ablate("*", (expert,)) if kind == "ablate" else Mask("*", (expert,))
