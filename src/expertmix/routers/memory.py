"""What one pass has read so far, for routers that pool evidence over modules and tokens.

Evidence of a token: the mean of its scores over the modules that it has passed. Evidence at a
token: the sum of that over the tokens up to it, each halved again every `half_life` tokens. It
never looks ahead, so a prefill and cached decoding gather the same. Padding counts as nothing.

Lives as long as the pass; what decoding needs of it later is its `past`. Knows no router, no model
and no cache.

Legend: B rows, S columns, T = B * S tokens, E adapters, M modules, H positions that are kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from expertmix.errors import UnsupportedRuntimeError

CHUNK = 128
"""Columns that are summed by one product; the sum so far is carried from chunk to chunk."""
KEPT = 32
"""Positions whose evidence is kept, so that a cache can be cut back (speculative decoding)."""


@dataclass(frozen=True, eq=False)
class Past:
    """Evidence at the latest positions of some rows.

    Attributes:
        sums: (B, H, M, E) what was summed at each module.
        counts: (B, H) how many tokens went into it, halved in the same way.
    """

    sums: Tensor
    counts: Tensor

    def cut(self, positions: int) -> Past | None:
        """Without the latest positions; None where no older one was kept."""
        if positions >= self.counts.shape[1]:
            return None
        keep = self.counts.shape[1] - positions
        return Past(self.sums[:, :keep], self.counts[:, :keep])

    def rows(self, indices: Tensor) -> Past:
        """Some rows, in this order."""
        indices = indices.to(self.counts.device)
        return Past(self.sums.index_select(0, indices), self.counts.index_select(0, indices))

    def repeated(self, times: int) -> Past:
        """Every row so many times."""
        return Past(self.sums.repeat_interleave(times, 0), self.counts.repeat_interleave(times, 0))


class Memory:
    """Evidence of the pass that is running.

    Args:
        real: (B, S) bool, False for padding.
        half_life: In tokens; None never forgets.
        past: Of the tokens before this pass, or None for none.
        prior: So many tokens without evidence are counted in.
    """

    def __init__(
        self,
        real: Tensor,
        half_life: float | None,
        past: Past | None = None,
        *,
        prior: float = 0.0,
    ) -> None:
        self._shape = real.shape
        self._past = past
        self._chunks = _chunks(real, 1.0 if half_life is None else 0.5 ** (1 / half_life))
        before_B1 = None if past is None else past.counts[:, -1, None].to(real.device)
        self._counts = _summed(real[..., None].float(), self._chunks, before_B1)  # (B, S, 1)
        # padding that comes first counts nothing, and without a prior that would be divided by
        self._divisors = (self._counts + prior).clamp(min=torch.finfo(self._counts.dtype).tiny)
        self._total: Tensor | None = None
        self._modules = torch.zeros(())
        self._sums: list[Tensor] = []  # per module that gave evidence (B, H, E)
        self._pooled: Tensor | None = None  # until there is new evidence

    @property
    def tokens(self) -> int:
        """T, padding included."""
        return self._shape.numel()

    @property
    def empty(self) -> bool:
        """Whether no module has given evidence yet."""
        return self._total is None

    def add(self, evidence: Tensor, available: Tensor) -> None:
        """Add the evidence of one module.

        Args:
            evidence: (T, E), comparable between adapters; what the unavailable have is ignored.
            available: (E,) bool, which adapters do something there.
        """
        evidence = evidence.masked_fill(~available, 0.0)
        present = available.to(evidence.dtype)
        self._pooled = None
        before = 0.0 if self._total is None else self._total.to(evidence.device)
        self._total = before + evidence
        self._modules = self._modules.to(evidence.device) + present

    def pooled(self) -> Tensor:
        """(T, E) mean evidence at every token, after the modules so far.

        Raises:
            UnsupportedRuntimeError: The pass before this one ran fewer modules.
        """
        if self._pooled is None:
            self._pooled = self._pool()
        return self._pooled

    def _pool(self) -> Tensor:
        assert self._total is not None, "add comes first"
        mean_TE = self._total / self._modules.clamp(min=1)
        mean_BSE = mean_TE.view(*self._shape, mean_TE.shape[1])
        sums_BSE = _summed(mean_BSE, self._chunks, self._before(mean_BSE))
        self._sums.append(_latest(sums_BSE))
        return (sums_BSE / self._divisors.to(mean_BSE)).flatten(0, 1)

    def _before(self, like: Tensor) -> Tensor | None:
        """(B, E) what the next module had summed before this pass."""
        if self._past is None:
            return None
        if len(self._sums) == self._past.sums.shape[2]:
            raise UnsupportedRuntimeError(
                f"more modules run in this pass than the {len(self._sums)} of the pass before, so "
                f"its evidence cannot be continued. Run the same modules in every pass, or use a "
                f"router without memory, such as SpectR."
            )
        return self._past.sums[:, -1, len(self._sums)].to(like)

    def past(self) -> Past:
        """Evidence at the latest positions, after a complete pass."""
        device = self._sums[0].device
        sums_BHME = torch.stack([sums.to(device) for sums in self._sums], 2)
        new = Past(sums_BHME, self._counts[:, -KEPT:, 0].to(device))
        room = KEPT - new.counts.shape[1]
        if self._past is None or not room:
            return new
        old = self._past
        return Past(
            torch.cat([old.sums[:, -room:].to(device), new.sums], 1),
            torch.cat([old.counts[:, -room:].to(device), new.counts], 1),
        )


def _latest(sums_BSE: Tensor) -> Tensor:
    """(B, H, E) the end of it alone: a view would keep all of it, module after module."""
    latest_BHE = sums_BSE[:, -KEPT:].detach()
    return latest_BHE if sums_BSE.shape[1] <= KEPT else latest_BHE.clone()


@dataclass(frozen=True, eq=False)
class _Chunk:
    """How much of earlier columns is left: (b, s, s) inside of it, (b, s, 1) of what is before."""

    inside: Tensor
    before: Tensor


def _chunks(real: Tensor, keep: float) -> list[_Chunk]:
    # rows without padding are all alike: b = 1
    alike_bS = real[:1] if bool(real.all()) else real
    return [_chunk(real_bs, keep) for real_bs in torch.split(alike_bS, CHUNK, 1)]


def _chunk(real: Tensor, keep: float) -> _Chunk:
    read_bs = real.cumsum(1)
    apart_bss = (read_bs[:, :, None] - read_bs[:, None, :]).clamp(min=0)
    seen_bss = real[:, None, :].expand_as(apart_bss).tril()
    inside_bss = torch.where(seen_bss, torch.pow(keep, apart_bss.float()), 0.0)
    return _Chunk(inside_bss, torch.pow(keep, read_bs.float())[..., None])


def _summed(values: Tensor, chunks: list[_Chunk], before: Tensor | None) -> Tensor:
    """(B, S, E) decayed sums over the columns up to each, of (B, S, E) values after (B, E)."""
    parts = []
    for part_BsE, chunk in zip(torch.split(values, CHUNK, 1), chunks, strict=True):
        sums_BsE = chunk.inside.to(part_BsE) @ part_BsE
        if before is not None:
            sums_BsE = sums_BsE + chunk.before.to(part_BsE) * before[:, None]
        parts.append(sums_BsE)
        before = sums_BsE[:, -1] if sums_BsE.shape[1] else before
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
