"""LAG (arXiv 2507.05346): Arrow names some candidates, projections choose among them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from expertmix.errors import ConfigError
from expertmix.routers.directions import ABSENT
from expertmix.routers.router import Router, available_scores
from expertmix.routers.rule import Rule, scored
from expertmix.routers.seen import Seen


@dataclass(frozen=True)
class Lag(Router):
    """The m highest by |v_i1ᵀ x|, then the best of them by ‖V_iᵀ x‖.

    Costs one direction per adapter and all directions of m, however many adapters there are.

    Attributes:
        m: Candidates per token; a module with fewer adapters takes all of them.
        top_k: Adapters per token, 1 in the paper; at most m.
        temperature: Of the softmax, where weights are that.
        weights: `uniform` or `softmax`.

    Raises:
        ConfigError: A value that is not possible.
    """

    m: int = 20
    top_k: int = 1
    temperature: float = 1.0
    weights: Literal["uniform", "softmax"] = "uniform"

    def __post_init__(self) -> None:
        if not isinstance(self.m, int) or isinstance(self.m, bool):
            raise ConfigError(f"m must be a whole number: {self.m!r}")
        if self.rule.top_k is None or self.m < self.top_k:
            raise ConfigError(f"Lag chooses top_k={self.top_k} of m={self.m} candidates")

    @property
    def rule(self) -> Rule:
        """Top-k among the candidates."""
        return scored(self.top_k, self.weights, self.temperature)

    def scores(self, seen: Seen) -> Tensor:
        """(T, E) ‖V_iᵀ x‖ of the candidates, minus infinity for all others."""
        if self.m >= seen.directions.count:
            return seen.directions.norms(seen.projected)
        first_TE = available_scores(seen.first, seen)
        candidates_Tm = first_TE.topk(self.m, dim=1).indices
        kept_Tm = seen.norms(candidates_Tm)
        return kept_Tm.new_full(first_TE.shape, ABSENT).scatter(1, candidates_Tm, kept_Tm)
