"""How the iterations of a chain divide the work: `chains`, counted from a trace in one pass.

A chain is a layer of which a trace has several steps (`model.layers.3.mlp#0`, `#1`). Its iterations
share their experts, so expert i is the same at each of them (Chain-of-Experts, arXiv 2506.18945).
Knows decisions only: not how large an update was (`experts.chain_updates`), nor whether it helped.

Legend: N tokens of a part, E experts, G groups of texts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expertmix.attribute import spread
from expertmix.attribute.mass import UsageCounter
from expertmix.attribute.passage import Passage, PassageSums
from expertmix.attribute.tally import SiteUsage, Usage
from expertmix.core.by_text import GROUPS, group_of, ratio, ratios
from expertmix.core.decision import Decision
from expertmix.core.estimate import Estimate
from expertmix.core.site import Site, SiteInfo
from expertmix.core.trace import Chunk, Trace

_PART = 4096  # tokens that are made dense at a time: bounds memory


@dataclass(frozen=True, eq=False)
class ChainUsage:
    """One layer, iteration by iteration.

    Attributes:
        name: The layer's module.
        iterations: Load, entropy and dead experts of each iteration that ran, in order.
        passages: From each iteration to the next.
        skips: From each to the one after the next; empty for two iterations.
        first: Per expert, which share of its calls is in the first iteration.
        last: The same of the last one.
        hub: Per iteration, which share of the weight its K busiest experts take.
    """

    name: str
    iterations: tuple[SiteUsage, ...]
    passages: tuple[Passage, ...]
    skips: tuple[Passage, ...]
    first: tuple[Estimate, ...]
    last: tuple[Estimate, ...]
    hub: tuple[Estimate, ...]

    @property
    def info(self) -> SiteInfo:
        """Of the first iteration; the experts are the same in all."""
        return self.iterations[0].info

    @property
    def experts(self) -> tuple[str, ...]:
        """E names, or numbers where they have none."""
        return tuple(self.info.expert_name(expert) for expert in range(self.info.num_experts))

    @property
    def calls(self) -> Tensor:
        """(E,) int64, calls of each expert in all iterations."""
        return torch.stack([one.total.calls for one in self.iterations]).sum(0)

    def busiest(self, most: int) -> list[int]:
        """The experts with most calls, in their own order."""
        return sorted(self.calls.argsort(descending=True, stable=True)[:most].tolist())

    @property
    def entries(self) -> tuple[int, ...]:
        """Experts that are called mostly in the first iteration, clearly so."""
        return _mostly(self.first)

    @property
    def accumulators(self) -> tuple[int, ...]:
        """Experts that are called mostly in the last iteration, clearly so."""
        return _mostly(self.last)

    @property
    def dead(self) -> tuple[int, ...]:
        """Experts that no token called in any iteration."""
        never = [set(one.total.dead) for one in self.iterations]
        return tuple(sorted(set.intersection(*never)))


@dataclass(frozen=True, eq=False)
class Chains:
    """The chains of a trace.

    Attributes:
        layers: In the model's order; layers that do not iterate are not among them. Often empty.
        tokens: Real tokens in the trace.
        samples: Texts.
    """

    layers: tuple[ChainUsage, ...]
    tokens: int
    samples: int

    def __iter__(self) -> Iterator[ChainUsage]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, name: str) -> ChainUsage:
        return next(layer for layer in self.layers if layer.name == name)


def chains(trace: Trace) -> Chains:
    """Retention, transitions and load of all chains of a trace.

    Reads the trace once. Padding, and slots without an expert, are left out.

    Returns:
        A layer for each that ran more than one iteration; none of any other trace.

    Raises:
        TraceError: The trace has no sites or no tokens.

    Example:
        >>> found = chains(trace)["model.layers.3.mlp"]
        >>> found.passages[0].retention, found.passages[0].chance
    """
    usage, counter = UsageCounter(trace.meta.sites, ()), ChainCounter(trace.meta.sites)
    if trace.meta.sites:
        for chunk in trace.chunks():
            usage.add(chunk)
            counter.add(chunk)
    return counter.result(usage.result())


def passages(trace: Trace, pairs: Sequence[tuple[Site, Site]]) -> tuple[Passage, ...]:
    """Who follows whom between any two sites of a trace: two layers, say.

    Args:
        trace: In memory or in a file.
        pairs: (source, target).
    """
    infos = {site: trace.info(site) for pair in pairs for site in pair}
    sums = [PassageSums(infos[source], infos[target]) for source, target in pairs]
    for chunk in trace.chunks():
        for called, group_N in _parts(chunk, infos):
            for (source, target), one in zip(pairs, sums, strict=True):
                if source in called and target in called:
                    one.add(called[source] != 0, called[target] != 0, group_N)
    return tuple(one.result() for one in sums)


class ChainCounter:
    """Counts the chunks of a trace as they pass by.

    Args:
        infos: All sites of the trace; those that do not iterate are passed over.
    """

    def __init__(self, infos: Sequence[SiteInfo]) -> None:
        self._layers = _by_layer(infos)
        members = [info for steps in self._layers.values() for info in steps]
        self._sums = {info.site: _SiteSums(info) for info in members}
        self._moves = {
            (one.site, other.site): PassageSums(one, other)
            for steps in self._layers.values()
            for gap in (1, 2)
            for one, other in zip(steps, steps[gap:], strict=False)
        }

    def add(self, chunk: Chunk) -> None:
        """Count one chunk; iterations that did not run in it are left as they are."""
        for weights, group_N in _parts(chunk, self._sums) if self._layers else ():
            called = {site: weights_NE != 0 for site, weights_NE in weights.items()}
            for site, weights_NE in weights.items():
                self._sums[site].add(weights_NE, called[site], group_N)
            for (source, target), sums in self._moves.items():
                if source in called and target in called:
                    sums.add(called[source], called[target], group_N)

    def result(self, usage: Usage) -> Chains:
        """What was counted so far.

        Args:
            usage: Counted over the same chunks, site by site.
        """
        known = {one.site: one for one in usage if one.total.routed}
        ran = {
            name: [known[info.site] for info in steps if info.site in known]
            for name, steps in self._layers.items()
        }
        layers = tuple(self._layer(name, steps) for name, steps in ran.items() if len(steps) > 1)
        return Chains(layers, usage.tokens, usage.samples)

    def _layer(self, name: str, steps: Sequence[SiteUsage]) -> ChainUsage:
        sites = [one.site for one in steps]
        calls = [self._sums[site].calls for site in sites]
        whole_GE = torch.stack(calls).sum(0)
        return ChainUsage(
            name,
            tuple(steps),
            self._passages(sites, 1),
            self._passages(sites, 2),
            ratios(calls[0], whole_GE),
            ratios(calls[-1], whole_GE),
            tuple(self._sums[site].hub() for site in sites),
        )

    def _passages(self, sites: Sequence[Site], gap: int) -> tuple[Passage, ...]:
        pairs = zip(sites, sites[gap:], strict=False)
        return tuple(self._moves[pair].result() for pair in pairs if pair in self._moves)


class _SiteSums:
    """Calls and weight of one iteration, by group of texts."""

    def __init__(self, info: SiteInfo) -> None:
        self._top_k = info.top_k
        self.calls = torch.zeros(GROUPS, info.num_experts, dtype=torch.float64)
        self._share = torch.zeros(GROUPS, info.num_experts, dtype=torch.float64)

    def add(self, weights_NE: Tensor, called_NE: Tensor, group_N: Tensor) -> None:
        share_NE = spread.shares(weights_NE).nan_to_num(0)  # nan: called nobody
        self.calls.index_add_(0, group_N, called_NE.to(torch.float64))
        self._share.index_add_(0, group_N, share_NE)

    def hub(self) -> Estimate:
        busiest = self._share.sum(0).topk(min(self._top_k, self._share.shape[1])).indices
        return ratio(self._share[:, busiest].sum(1), self._share.sum(1))


def _by_layer(infos: Iterable[SiteInfo]) -> dict[str, list[SiteInfo]]:
    """Iterations by layer, in order; of the layers that have several with the same experts."""
    found: dict[str, list[SiteInfo]] = {}
    for info in infos:
        found.setdefault(info.site.name, []).append(info)
    ordered = {
        name: sorted(steps, key=lambda info: info.site.step) for name, steps in found.items()
    }
    return {
        name: steps
        for name, steps in ordered.items()
        if len(steps) > 1 and len({(info.num_experts, info.experts) for info in steps}) == 1
    }


def _parts(chunk: Chunk, sites: Iterable[Site]) -> Iterator[tuple[dict[Site, Tensor], Tensor]]:
    """Real tokens, some thousands at a time: (N, E) weights by site, (N,) groups of texts."""
    tokens = chunk.tokens.cpu()
    ran = [site for site in sites if site in chunk.decisions]
    real_N = tokens.real.nonzero().flatten()
    for start in range(0, len(real_N), _PART):
        rows = real_N[start : start + _PART]
        weights = {site: _dense(chunk.decisions[site], rows) for site in ran}
        yield weights, group_of(tokens.sample[rows])


def _dense(decision: Decision, rows: Tensor) -> Tensor:
    """(N, E) float64 weights, on the CPU and out of the autograd graph."""
    weights = decision.weights.detach().cpu()[rows].to(torch.float64)
    return Decision(decision.indices.cpu()[rows], weights, decision.num_experts).dense()


def _mostly(shares: Sequence[Estimate]) -> tuple[int, ...]:
    """Two thirds or more, where the interval leaves out one half."""
    clear = (one.value >= 2 / 3 and one.low > 0.5 for one in shares)
    return tuple(expert for expert, found in enumerate(clear) if found)
