"""How a trace is counted: one pass, chunk by chunk, with flat memory.

`usage` is the whole of it; `UsageCounter` is there for whoever reads the chunks for other reasons
too and does not want to read a file twice. Sums are float64, whatever the weights are.

Legend: N tokens of a block, K selected experts, E experts, G groups: 0 for unlabeled, then one per
label.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from expertmix.attribute import spread
from expertmix.attribute.tally import SiteUsage, Tally, Transition, Usage
from expertmix.core.decision import Decision
from expertmix.core.site import Site, SiteInfo
from expertmix.core.trace import Chunk, Trace
from expertmix.errors import TraceError

_BLOCK = 4096  # tokens that are made dense at a time: bounds memory, and stays in the cache

Pairs = Sequence[tuple[Site, Site]]


def usage(trace: Trace, pairs: Pairs | None = None) -> Usage:
    """Frequency, mass, entropy, balance, co-activation and transitions of a trace.

    Reads the trace once. Padding, and slots without an expert, are left out.

    Args:
        trace: In memory or in a file.
        pairs: Which sites to count transitions between; consecutive ones by default.

    Raises:
        TraceError: The trace has no sites or no tokens.
    """
    counter = UsageCounter(trace.meta.sites, pairs)
    if trace.meta.sites:
        for chunk in trace.chunks():
            counter.add(chunk)
    return counter.result()


def top1(decision: Decision) -> Tensor:
    """(N,) int64: the expert with the largest |weight| of each token, -1 where none was called.

    The first slot wins a tie: most routers list the selected experts best first.
    """
    if not decision.top_k:
        return torch.full((len(decision),), -1, dtype=torch.int64)
    size_NK = decision.weights.detach().abs().masked_fill(decision.indices < 0, 0)
    best_N1 = size_NK.argmax(1, keepdim=True)
    winner_N = decision.indices.gather(1, best_N1).squeeze(1)
    return winner_N.masked_fill(size_NK.gather(1, best_N1).squeeze(1) == 0, -1)


class UsageCounter:
    """Counts the chunks of a trace as they pass by.

    Args:
        infos: The sites, in the model's order.
        pairs: Which sites to count transitions between; consecutive ones by default.
    """

    def __init__(self, infos: Sequence[SiteInfo], pairs: Pairs | None = None) -> None:
        sites = [info.site for info in infos]
        self._pairs = tuple(pairwise(sites)) if pairs is None else tuple(pairs)
        self._sums = {info.site: _SiteSums(info) for info in infos}
        self._groups = _Groups()
        size = {info.site: info.num_experts for info in infos}
        self._moves = {
            pair: torch.zeros(size[pair[0]], size[pair[1]], dtype=torch.int64)
            for pair in self._pairs
        }

    def add(self, chunk: Chunk) -> None:
        """Count one chunk; sites that did not run in it are left as they are."""
        tokens = chunk.tokens.cpu()
        real_N = tokens.real.nonzero().flatten()
        group_N = self._groups.read(tokens.sample[real_N], chunk.labels)
        first: dict[Site, Tensor] = {}
        for site, sums in self._sums.items():
            if site in chunk.decisions:
                first[site] = sums.add(_real_rows(chunk.decisions[site], real_N), group_N)
        for source, target in self._pairs:
            if source in first and target in first:
                _count_moves(self._moves[source, target], first[source], first[target])

    def result(self) -> Usage:
        """What was counted so far.

        Raises:
            TraceError: No sites, or no tokens other than padding.
        """
        if not self._sums:
            raise TraceError("the trace has no sites: nothing was recorded that routes")
        if not self._groups.tokens:
            raise TraceError("the trace is empty: run the model inside the record block")
        labels = self._groups.labels
        return Usage(
            sites=tuple(sums.result(labels) for sums in self._sums.values()),
            labels=labels,
            label_tokens=self._groups.label_tokens(),
            transitions=tuple(Transition(*pair, self._moves[pair]) for pair in self._pairs),
            tokens=self._groups.tokens,
            samples=len(self._groups.samples),
        )


class _Groups:
    """Which label each sample has, and how many tokens that makes."""

    def __init__(self) -> None:
        self.samples: set[int] = set()
        self.tokens = 0
        self._group_of_label: dict[str, int] = {}
        self._group_of_sample: dict[int, int] = {}
        self._counts: dict[int, int] = {}

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(self._group_of_label)

    def label_tokens(self) -> dict[str, int]:
        return {name: self._counts[group] for name, group in self._group_of_label.items()}

    def read(self, sample_N: Tensor, labels: Mapping[int, str]) -> Tensor:
        """(N,) group of each token; labels are remembered from chunk to chunk."""
        found, place_N, count = sample_N.unique(  # type: ignore[no-untyped-call]
            return_inverse=True, return_counts=True
        )
        numbers = found.tolist()
        groups = [self._group(number, labels) for number in numbers]
        for group, tokens in zip(groups, count.tolist(), strict=True):
            self._counts[group] = self._counts.get(group, 0) + tokens
        self.samples.update(numbers)
        self.tokens += len(sample_N)
        return torch.tensor(groups, dtype=torch.int64)[place_N]

    def _group(self, sample: int, labels: Mapping[int, str]) -> int:
        label = labels.get(sample)
        if label is None:
            return self._group_of_sample.get(sample, 0)
        group = self._group_of_label.setdefault(label, len(self._group_of_label) + 1)
        self._group_of_sample[sample] = group
        return group


class _SiteSums:
    """Running sums of one site; every table but the last has a row per group."""

    def __init__(self, info: SiteInfo) -> None:
        experts = info.num_experts
        self.info = info
        self._integers = {
            "tokens": torch.zeros(0, 3, dtype=torch.int64),  # all, routed, with logits
            "calls": torch.zeros(0, experts, dtype=torch.int64),
            "top1": torch.zeros(0, experts, dtype=torch.int64),
        }
        self._reals = {
            "nats": torch.zeros(0, 2, dtype=torch.float64),  # of the weights, of the logits
            "weight": torch.zeros(0, experts, dtype=torch.float64),
            "share": torch.zeros(0, experts, dtype=torch.float64),
        }
        self._together = torch.zeros(experts, experts, dtype=torch.int64)

    def add(self, decision: Decision, group_N: Tensor) -> Tensor:
        """Count n real tokens of n groups; returns their (N,) top-1 experts."""
        first_N = top1(decision)
        if len(decision):
            self._grow(int(group_N.max()) + 1)
        for start in range(0, len(decision), _BLOCK):
            part = slice(start, start + _BLOCK)
            self._add_weights(_dense(decision, part), group_N[part])
            self._add_first(first_N[part], group_N[part])
            if decision.logits is not None:
                self._add_logits(decision.logits[part], group_N[part])
        return first_N

    def _add_weights(self, dense_NE: Tensor, group_N: Tensor) -> None:
        called_NE = dense_NE != 0
        routed_N = called_NE.any(1)
        share_NE = spread.shares(dense_NE).masked_fill(~routed_N[:, None], 0)
        _add_groups(self._integers["tokens"][:, 0], group_N)
        _add_groups(self._integers["tokens"][:, 1], group_N[routed_N])
        _add_rows(self._integers["calls"], group_N, called_NE)
        _add_rows(self._reals["weight"], group_N, dense_NE)
        _add_rows(self._reals["share"], group_N, share_NE)
        _add_groups(self._reals["nats"][:, 0], group_N, spread.entropy(share_NE))
        # float32 counts are exact up to 2^24, far above a block
        together_EE = called_NE.to(torch.float32).T @ called_NE.to(torch.float32)
        self._together += together_EE.to(torch.int64)

    def _add_first(self, first_N: Tensor, group_N: Tensor) -> None:
        won_N = first_N >= 0
        _add_pairs(self._integers["top1"], group_N[won_N], first_N[won_N])

    def _add_logits(self, logits_NE: Tensor, group_N: Tensor) -> None:
        logits_NE = logits_NE.to(torch.float64)
        odds_NE = (logits_NE - logits_NE.amax(-1, keepdim=True)).exp()
        nats_N = spread.entropy(spread.shares(odds_NE))
        _add_groups(self._reals["nats"][:, 1], group_N, nats_N)
        _add_groups(self._integers["tokens"][:, 2], group_N)

    def _grow(self, groups: int) -> None:
        for tables in (self._integers, self._reals):
            for name, table in tables.items():
                missing = max(0, groups - len(table))
                tables[name] = torch.cat([table, table.new_zeros(missing, table.shape[1])])

    def result(self, labels: Sequence[str]) -> SiteUsage:
        """The sums as tallies."""
        self._grow(len(labels) + 1)
        by_label = {label: self._tally(slice(row, row + 1)) for row, label in enumerate(labels, 1)}
        return SiteUsage(self.info, self._tally(slice(None)), by_label, self._together.clone())

    def _tally(self, rows: slice) -> Tally:
        tokens, routed, with_logits = self._integers["tokens"][rows].sum(0).tolist()
        of_weights, of_logits = self._reals["nats"][rows].sum(0).tolist()
        return Tally(
            tokens=tokens,
            routed=routed,
            calls=self._integers["calls"][rows].sum(0),
            top1=self._integers["top1"][rows].sum(0),
            weight=self._reals["weight"][rows].sum(0),
            share=self._reals["share"][rows].sum(0),
            entropy_sum=of_weights,
            logit_tokens=with_logits,
            logit_entropy_sum=of_logits,
        )


def _add_rows(table: Tensor, row_N: Tensor, values: Tensor) -> None:
    """Add row n of the values to row `row_N[n]` of a (G, E) table."""
    table.index_add_(0, row_N, values.to(table.dtype))


def _add_groups(sums_G: Tensor, group_N: Tensor, values_N: Tensor | None = None) -> None:
    """Add values, or ones, to their groups.

    With bincount, which runs on one thread: index_add_ and index_put_ start threads even for a few
    tokens, and on a busy machine wait tens of milliseconds for a core.
    """
    sums_G += torch.bincount(group_N, values_N, minlength=len(sums_G)).to(sums_G.dtype)


def _add_pairs(counts_XY: Tensor, row_N: Tensor, column_N: Tensor) -> None:
    """Count pairs of row and column."""
    _add_groups(counts_XY.view(-1), row_N * counts_XY.shape[1] + column_N)


def _real_rows(decision: Decision, real_N: Tensor) -> Decision:
    """The decision on the CPU, out of the autograd graph, without padding."""
    logits = None if decision.logits is None else decision.logits.detach().cpu()
    whole = Decision(
        decision.indices.cpu(), decision.weights.detach().cpu(), decision.num_experts, logits
    )
    return whole.rows(real_N)


def _dense(decision: Decision, rows: slice) -> Tensor:
    """(n, E) float64 weights of some rows."""
    part = Decision(
        decision.indices[rows], decision.weights[rows].to(torch.float64), decision.num_experts
    )
    return part.dense()


def _count_moves(counts_EE: Tensor, source_N: Tensor, target_N: Tensor) -> None:
    both_N = (source_N >= 0) & (target_N >= 0)
    _add_pairs(counts_EE, source_N[both_N], target_N[both_N])
