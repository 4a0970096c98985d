"""Which tokens are shown one by one: `Strip`, the start of a sample with its decisions.

One sample per label, cut to a length that keeps the page small, is taken from the chunks of a trace
as they pass by.

Legend: n tokens of a chunk, K selected experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expertmix.core.decision import Decision
from expertmix.core.site import Site, SiteInfo
from expertmix.core.trace import Chunk

_SLOTS = 400_000  # decisions that a page holds at most: about 1 MB
_LONGEST = 140
_SHORTEST = 24


@dataclass(frozen=True, eq=False)
class Strip:
    """Some tokens of a sample in order.

    Attributes:
        sample: Number of the sequence.
        label: Its label, or None.
        tokens: n token strings, or None where text was not recorded.
        length: n.
        experts: Per site (n, K) int64, best first; -1 where there is none.
        shares: Per site (n, K) float64, each token's |weight| divided by its sum; 0 without one.
        cut: The sample goes on.
        prompt: What it answers, or None.
    """

    sample: int
    label: str | None
    tokens: tuple[str, ...] | None
    length: int
    experts: Mapping[Site, Tensor]
    shares: Mapping[Site, Tensor]
    cut: bool
    prompt: str | None = None


class StripCollector:
    """Takes strips from the chunks of a trace.

    Args:
        infos: The sites.
        most: Strips at most: one for each of the first labels, or the first samples without labels.
    """

    def __init__(self, infos: Sequence[SiteInfo], most: int = 12) -> None:
        slots = sum(info.top_k for info in infos)
        budget = _SLOTS // max(1, slots * most)
        self.length = max(_SHORTEST, min(_LONGEST, budget))
        self._infos = infos
        self._most = most
        self._open: dict[int, _OpenStrip] = {}
        self._labels: set[str] = set()

    def add(self, chunk: Chunk) -> None:
        """Take what is wanted from a chunk."""
        tokens = chunk.tokens.cpu()
        for sample in tokens.sample[tokens.real].unique().tolist():  # type: ignore[no-untyped-call]
            if self._wanted(sample, chunk.labels.get(sample)):
                rows = ((tokens.sample == sample) & tokens.real).nonzero().flatten()
                self._open[sample].add(chunk, rows, self.length)

    def result(self) -> tuple[Strip, ...]:
        """The strips: labels in order of appearance."""
        return tuple(strip.close(self._infos) for strip in self._open.values())

    def _wanted(self, sample: int, label: str | None) -> bool:
        if sample in self._open:
            return True
        new = label is None or label not in self._labels
        if not new or len(self._open) >= self._most:
            return False
        if label is not None:
            self._labels.add(label)
        self._open[sample] = _OpenStrip(sample, label)
        return True


class _OpenStrip:
    """A strip that still grows: decoding adds tokens chunk by chunk."""

    def __init__(self, sample: int, label: str | None) -> None:
        self.sample = sample
        self.label = label
        self._length = 0
        self._cut = False
        self._text: list[str] | None = []
        self._parts: list[tuple[int, Mapping[Site, Decision]]] = []

    def add(self, chunk: Chunk, rows: Tensor, length: int) -> None:
        kept = rows[: length - self._length]
        self._cut = self._cut or len(kept) < len(rows)
        if not len(kept):
            return
        self._length += len(kept)
        self._parts.append((len(kept), {s: _cpu(d, kept) for s, d in chunk.decisions.items()}))
        if chunk.text is None:
            self._text = None
        elif self._text is not None:
            self._text.extend(chunk.text[row] for row in kept.tolist())

    def close(self, infos: Sequence[SiteInfo]) -> Strip:
        experts, shares = {}, {}
        for info in infos:
            parts = [_ranked(decisions.get(info.site), n) for n, decisions in self._parts]
            width = max(part[0].shape[1] for part in parts)
            experts[info.site] = torch.cat([_widen(part[0], width, -1) for part in parts])
            shares[info.site] = torch.cat([_widen(part[1], width, 0) for part in parts])
        text = None if self._text is None else tuple(self._text)
        return Strip(self.sample, self.label, text, self._length, experts, shares, self._cut)


def _cpu(decision: Decision, rows: Tensor) -> Decision:
    """A few rows of a decision, without logits and outside the autograd graph."""
    part = Decision(decision.indices, decision.weights.detach(), decision.num_experts)
    part = part.rows(rows.to(decision.indices.device))
    return Decision(part.indices.cpu(), part.weights.cpu(), part.num_experts)


def _ranked(decision: Decision | None, n: int) -> tuple[Tensor, Tensor]:
    """(n, K) experts, best first, and their shares; nothing where the site did not run."""
    if decision is None:
        return torch.full((n, 1), -1, dtype=torch.int64), torch.zeros(n, 1, dtype=torch.float64)
    size_nK = decision.weights.to(torch.float64).abs().masked_fill(decision.indices < 0, 0)
    share_nK = size_nK / size_nK.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    best = share_nK.sort(dim=1, descending=True, stable=True)
    experts_nK = decision.indices.gather(1, best.indices).masked_fill(best.values == 0, -1)
    return experts_nK, best.values


def _widen(values_nK: Tensor, width: int, fill: int) -> Tensor:
    return torch.nn.functional.pad(values_nK, (0, width - values_nK.shape[1]), value=fill)
