"""Base, MoE and own expert side by side: `Comparison`, losses on the same text.

The own expert of a domain is the one of its name, forced for every token at every site: what a
router that knows the domain could do with one expert.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from expertmix.core.progress import Progress
from expertmix.core.reweight import Reweight
from expertmix.core.trace import Trace
from expertmix.report.table import Cell, Table
from expertmix.study.corpus import Corpus
from expertmix.study.tracing import NOISE, Keep, Run, run


@dataclass(frozen=True, eq=False, slots=True)
class Comparison:
    """Three ways to read the same text.

    Attributes:
        base: The dense model.
        moe: The MoE with its own routers; its trace was recorded.
        own: Per domain, the MoE with the expert of that name forced everywhere.
    """

    base: Run
    moe: Run
    own: Mapping[str, Run]

    @property
    def trace(self) -> Trace:
        """Of the MoE's own routing."""
        assert self.moe.trace is not None
        return self.moe.trace

    @property
    def domains(self) -> tuple[str, ...]:
        """Domains in order."""
        return self.moe.corpus.labels

    def losses(self, domain: str) -> tuple[float, float, float]:
        """Of base, MoE and own expert, in nats per token."""
        return self.base.loss(domain), self.moe.loss(domain), self.own[domain].loss(domain)

    def reached(self, domain: str) -> float:
        """The MoE's gain over the base as a share of the own expert's gain; can exceed 1.

        `nan` where the own expert gains nothing worth dividing by.
        """
        base, moe, own = self.losses(domain)
        return (base - moe) / (base - own) if base - own > NOISE else math.nan

    def table(self) -> Table:
        """Losses by domain."""
        return Table(
            title="Loss by domain: base, MoE and own expert",
            columns=("domain", "tokens", "base", "MoE", "own expert", "gain reached"),
            rows=tuple(self._row(domain) for domain in self.domains),
            best="lowest",
            headline=self._headline(),
            note=(
                "Mean next-token loss in nats; lower is better. Base is the dense model; MoE lets "
                "the routers choose experts for every token and layer; own expert forces the "
                "expert of the domain's name everywhere. The last column is the MoE's gain over "
                "the base as a share of the own expert's gain; above 100 % the mixture beats the "
                "single expert. The texts are few and short: read differences of a few hundredths "
                "as equal."
            ),
        )

    def _row(self, domain: str) -> tuple[Cell, ...]:
        tokens = self.moe.corpus.labeled(domain).tokens
        reached = self.reached(domain)
        share = None if math.isnan(reached) else f"{100 * reached:.0f} %"
        return (domain, f"{tokens:,}", *self.losses(domain), share)

    def _headline(self) -> str:
        gains = [self.base.loss(domain) - self.moe.loss(domain) for domain in self.domains]
        better, worse = sum(g > NOISE for g in gains), sum(g < -NOISE for g in gains)
        return (
            f"The MoE reads {better} of {len(self.domains)} domains better than its base does, "
            f"{worse} worse (by more than {NOISE} nats per token)."
        )


def compare(
    base: Any, moe: Any, corpus: Corpus, experts: tuple[str, ...], *, keep: Keep, progress: Progress
) -> Comparison:
    """Read a corpus with all three.

    Args:
        base: The dense model.
        moe: The MoE.
        corpus: Every label is the name of an expert.
        experts: Names of the MoE's experts, in order.
        keep: What of the MoE's decisions to keep.
        progress: Told the samples that are done.
    """
    own: dict[str, Run] = {}
    dense = run(base, corpus, progress=progress, stage="base")
    routed = run(moe, corpus, keep=keep, progress=progress, stage="MoE, recorded")
    for done, domain in enumerate(corpus.labels):
        progress("own experts", done, len(corpus.labels))
        own[domain] = run(moe, corpus.labeled(domain), forced(experts.index(domain), len(experts)))
    progress("own experts", len(own), len(own))
    return Comparison(dense, routed, own)


def forced(expert: int, num_experts: int) -> Reweight:
    """One expert with all the weight, everywhere."""
    values = torch.nn.functional.one_hot(torch.tensor(expert), num_experts)
    return Reweight("*", values.float(), stage="weights")
