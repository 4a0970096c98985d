"""Arrow (Ostapenko et al., arXiv 2405.11157): adapters are scored along one direction each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from expertmix.routers.router import Router
from expertmix.routers.rule import Rule, scored
from expertmix.routers.seen import Seen


@dataclass(frozen=True)
class Arrow(Router):
    """|v_i1ᵀ x|, v_i1 the first right singular vector of B_i A_i: exact, not by power iteration.

    Attributes:
        top_k: Adapters per token; None for all.
        temperature: Of the softmax over the selected.
        weights: `softmax` (the paper, and PEFT) or `uniform`.

    Raises:
        ConfigError: A value that is not possible.
    """

    top_k: int | None = 3
    temperature: float = 1.0
    weights: Literal["uniform", "softmax"] = "softmax"

    def __post_init__(self) -> None:
        _ = self.rule

    @property
    def rule(self) -> Rule:
        """Top-k, then a softmax over them."""
        return scored(self.top_k, self.weights, self.temperature)

    def scores(self, seen: Seen) -> Tensor:
        """(T, E) |v_i1ᵀ x|."""
        return seen.first
