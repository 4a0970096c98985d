"""Who follows whom: `Passage`, the calls of one site against those of the same tokens at another.

`Transition` (in `tally`) counts first choices, a token once; a passage counts every pair of calls,
a token K·K' times, and knows how sure its retention is. It says who follows, not that one is the
cause of the other. Serves two iterations of a chain as well as two layers.

Legend: N tokens, E experts of the source, F of the target, G groups of texts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from expertmix.core.by_text import GROUPS, add_to_groups, ratio
from expertmix.core.estimate import Estimate
from expertmix.core.site import Site, SiteInfo


@dataclass(frozen=True, eq=False)
class Passage:
    """Calls at a source and at a target, over the tokens that call somebody at both.

    Attributes:
        source: Site of the rows.
        target: Site of the columns.
        counts: (E, F) int64, tokens that call i at the source and j at the target.
        source_calls: (E,) int64, tokens that call i at the source.
        target_calls: (F,) int64.
        tokens: Tokens that were counted.
        retention: Share of a token's experts that it calls again, |S ∩ S'| / |S|, by token, with
            an interval over texts; nan where source and target have not the same experts.
    """

    source: Site
    target: Site
    counts: Tensor
    source_calls: Tensor
    target_calls: Tensor
    tokens: int
    retention: Estimate

    @property
    def chance(self) -> float:
        """Retention of an even random choice: K / E of the target."""
        if not self.tokens:
            return math.nan
        return int(self.target_calls.sum()) / (self.tokens * len(self.target_calls))

    @property
    def independent(self) -> float:
        """Retention if both chose as often as they do, but without regard to each other.

        Σ_i p(i) p'(i) / Σ_i p(i), p the share of tokens that call i. Above `chance` where both
        have the same favorites: retention means something only above both.
        """
        if not self.tokens or len(self.source_calls) != len(self.target_calls):
            return math.nan
        calls_E = self.source_calls.to(torch.float64)
        return float(calls_E @ self.target_calls.to(torch.float64) / self.tokens / calls_E.sum())

    @property
    def share(self) -> Tensor:
        """(E, F) float64: of the calls at the target that go with a call of i, those of j.

        Rows sum to 1; nan for experts that nobody called. Every call counts alike, whatever its
        weight.
        """
        counts_EF = self.counts.to(torch.float64)
        return counts_EF / counts_EF.sum(1, keepdim=True)

    @property
    def expected(self) -> Tensor:
        """(E, F) float64: counts if both chose without regard to each other."""
        source_E, target_F = self.source_calls.double(), self.target_calls.double()
        return torch.outer(source_E, target_F) / (self.tokens or math.nan)

    @property
    def lift(self) -> Tensor:
        """(E, F) float64: counts over the expected ones; 1 is no relation, nan without calls."""
        return self.counts / self.expected

    def strongest(self, most: int) -> list[tuple[int, int]]:
        """Pairs that occur more often than expected, those with the largest surplus first."""
        surplus_EF = (self.counts - self.expected).nan_to_num(0)
        best = surplus_EF.flatten().topk(min(most, surplus_EF.numel()))
        pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        return [divmod(place, surplus_EF.shape[1]) for value, place in pairs if value > 0]


class PassageSums:
    """Adds up a passage, part by part.

    Args:
        source: Site of the rows.
        target: Site of the columns.
    """

    def __init__(self, source: SiteInfo, target: SiteInfo) -> None:
        self._ends = source.site, target.site
        self._alike = source.num_experts == target.num_experts and source.experts == target.experts
        self._counts = torch.zeros(source.num_experts, target.num_experts, dtype=torch.int64)
        self._source = torch.zeros(source.num_experts, dtype=torch.int64)
        self._target = torch.zeros(target.num_experts, dtype=torch.int64)
        self._kept = torch.zeros(GROUPS, dtype=torch.float64)
        self._of = torch.zeros(GROUPS, dtype=torch.float64)
        self._tokens = 0

    def add(self, source_NE: Tensor, target_NF: Tensor, group_N: Tensor) -> None:
        """Count tokens.

        Args:
            source_NE: (N, E) bool, who is called at the source; N at most some thousands.
            target_NF: (N, F) bool.
            group_N: (N,) group of each token's text.
        """
        both_N = source_NE.any(1) & target_NF.any(1)
        source_NE, target_NF = source_NE[both_N], target_NF[both_N]
        # float32 counts are exact up to 2^24, far above a part
        pairs_EF = source_NE.to(torch.float32).T @ target_NF.to(torch.float32)
        self._counts += pairs_EF.to(torch.int64)
        self._source += source_NE.sum(0)
        self._target += target_NF.sum(0)
        self._tokens += len(source_NE)
        if self._alike:
            add_to_groups(self._kept, group_N[both_N], (source_NE & target_NF).sum(1))
            add_to_groups(self._of, group_N[both_N], source_NE.sum(1))

    def result(self) -> Passage:
        """What was counted so far."""
        retention = ratio(self._kept, self._of)
        return Passage(
            *self._ends,
            self._counts.clone(),
            self._source.clone(),
            self._target.clone(),
            self._tokens,
            retention,
        )
