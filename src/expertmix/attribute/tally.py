"""What was counted: `Usage`, how often and with how much weight each expert was called.

These are the *frequency and mass* columns of an attribution. They say who was called; they do not
say whose call mattered (INFORM, arXiv 2602.04291, keeps routing mass, routing sensitivity and task
effect apart, and so do we).

Legend: E experts of a site, N tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from expertmix.attribute import spread
from expertmix.core.site import Site, SiteInfo


@dataclass(frozen=True, eq=False)
class Tally:
    """Sums over tokens at one site (or at several sites with the same experts).

    A token *calls* an expert when it gives it a weight other than zero. Padding and slots without
    an expert never count.

    Attributes:
        tokens: Decisions that were counted, one per token and site.
        routed: Those of them that called at least one expert.
        calls: (E,) int64, tokens that called the expert.
        top1: (E,) int64, tokens that gave this expert their largest weight.
        weight: (E,) float64, sum of routing weights as the experts got them.
        share: (E,) float64, sum of each token's |weight| divided by its token's Σ|weight|.
        entropy_sum: Nats, summed over routed tokens: entropy of that division.
        logit_tokens: Tokens for which logits were recorded.
        logit_entropy_sum: Nats, summed over those: entropy of softmax(logits).
    """

    tokens: int
    routed: int
    calls: Tensor
    top1: Tensor
    weight: Tensor
    share: Tensor
    entropy_sum: float
    logit_tokens: int
    logit_entropy_sum: float

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.tokens + other.tokens,
            self.routed + other.routed,
            self.calls + other.calls,
            self.top1 + other.top1,
            self.weight + other.weight,
            self.share + other.share,
            self.entropy_sum + other.entropy_sum,
            self.logit_tokens + other.logit_tokens,
            self.logit_entropy_sum + other.logit_entropy_sum,
        )

    @property
    def frequency(self) -> Tensor:
        """(E,) float64 in 0..1: share of tokens that called the expert; sums to calls per token."""
        return self._mean(self.calls)

    @property
    def first_choice(self) -> Tensor:
        """(E,) float64 in 0..1: share of tokens whose largest weight went to the expert."""
        return self._mean(self.top1)

    @property
    def mass(self) -> Tensor:
        """(E,) float64: mean routing weight per token, not normalized.

        INFORM's routing mass m_j, with the router's weights in the place of its interaction matrix.
        """
        return self._mean(self.weight)

    @property
    def normalized_mass(self) -> Tensor:
        """(E,) float64 in 0..1: mean share of a token's routing weight; sums to routed / tokens."""
        return self._mean(self.share)

    @property
    def load(self) -> Tensor:
        """(E,) float64: share of all calls that went to the expert; sums to 1."""
        return spread.shares(self.calls)

    @property
    def entropy(self) -> float:
        """Nats per routed token: how evenly it divides its weight among the experts it calls."""
        return self.entropy_sum / self.routed if self.routed else math.nan

    @property
    def router_entropy(self) -> float:
        """Nats per token: mean entropy of softmax(logits) over all E; `nan` without logits.

        Computed so for every family, also where the router itself scores with another function.
        """
        return self.logit_entropy_sum / self.logit_tokens if self.logit_tokens else math.nan

    @property
    def balance(self) -> float:
        """Entropy of the load divided by log E: 1 is even, 0 is one expert for everything."""
        return spread.balance(self.calls)

    @property
    def peak(self) -> float:
        """Load of the busiest expert over the mean load."""
        return spread.peak(self.calls)

    @property
    def centralization(self) -> float:
        """Gini coefficient of the mass over its maximum (INFORM): 0 is even, 1 is a single hub."""
        return spread.gini(self.weight)

    @property
    def dead(self) -> tuple[int, ...]:
        """Experts that no token called. Says nothing of tokens that were not recorded."""
        return tuple((self.calls == 0).nonzero().flatten().tolist())

    def _mean(self, sums_E: Tensor) -> Tensor:
        return sums_E.to(torch.float64) / (self.tokens or math.nan)


@dataclass(frozen=True, eq=False)
class SiteUsage:
    """How the experts of one site were used.

    Attributes:
        info: The site and its experts.
        total: All tokens.
        by_label: The tokens of the samples with a label, by label; unlabeled samples are only in
            `total`.
        coactivation: (E, E) int64, tokens that called both experts; calls on the diagonal.
    """

    info: SiteInfo
    total: Tally
    by_label: Mapping[str, Tally]
    coactivation: Tensor

    @property
    def site(self) -> Site:
        """The site."""
        return self.info.site

    def tally(self, label: str | None = None) -> Tally:
        """The tally of a label, or of all tokens."""
        return self.total if label is None else self.by_label[label]

    @property
    def specialization(self) -> float:
        """How far the labels call different experts, 0 to 1 (see `spread.specialization`)."""
        if len(self.by_label) < 2:
            return math.nan
        return spread.specialization(torch.stack([part.calls for part in self.by_label.values()]))


@dataclass(frozen=True, eq=False)
class Transition:
    """Where the tokens of one site went at another.

    Attributes:
        source: Site of the rows.
        target: Site of the columns.
        counts: (E_source, E_target) int64, tokens by their top-1 expert at both.
    """

    source: Site
    target: Site
    counts: Tensor

    @property
    def kept(self) -> float:
        """Share of tokens whose expert has the same number at both; for like experts only."""
        total = int(self.counts.sum())
        return float(self.counts.diagonal().sum()) / total if total else math.nan


@dataclass(frozen=True, eq=False)
class Usage:
    """Frequency and mass of every expert at every site of a trace.

    Attributes:
        sites: Per site, in the model's order.
        labels: Labels that occur, in order of appearance.
        label_tokens: Real tokens per label.
        transitions: Between consecutive sites, or the pairs that were asked for.
        tokens: Real tokens in the trace.
        samples: Sequences in the trace.
    """

    sites: tuple[SiteUsage, ...]
    labels: tuple[str, ...]
    label_tokens: Mapping[str, int]
    transitions: tuple[Transition, ...]
    tokens: int
    samples: int

    def __iter__(self) -> Iterator[SiteUsage]:
        return iter(self.sites)

    def __getitem__(self, site: Site | str) -> SiteUsage:
        wanted = Site.parse(site) if isinstance(site, str) else site
        return next(found for found in self.sites if found.site == wanted)


def pool(sites: tuple[SiteUsage, ...], label: str | None = None) -> Tally:
    """Sum the tallies of sites, for which expert i must mean the same thing at each of them.

    Args:
        sites: At least one site; all with the same number of experts.
        label: Only the tokens of this label.
    """
    first, *others = (site.tally(label) for site in sites)
    return sum(others, first)
