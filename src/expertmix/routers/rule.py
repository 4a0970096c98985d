"""From scores to weights: how many adapters are selected, and what weight each gets.

A rule has the stages of every router: scores (the logits), probabilities over all adapters,
selection of the K highest, weights over these. It does not know where scores come from.

Legend: T tokens, E adapters, K selected adapters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from expertmix.errors import ConfigError

Weighting = Literal["uniform", "softmax", "given"]
_WEIGHTINGS = ("uniform", "softmax", "given")


@dataclass(frozen=True)
class Rule:
    """How scores become weights.

    Attributes:
        top_k: How many adapters a token gets; None for all that do something at a module. A module
            with fewer uses those it has.
        weights: `uniform` is 1 / K; `softmax` over the K scores / temperature; `given` is
            exp(score), for a router whose scores are logarithms of weights.
        temperature: Divides scores before a softmax.

    Raises:
        ConfigError: A value that is not possible.
    """

    top_k: int | None = 3
    weights: Weighting = "softmax"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        whole = isinstance(self.top_k, int) and not isinstance(self.top_k, bool)
        if self.top_k is not None and not (whole and self.top_k >= 1):
            raise ConfigError(f"top_k must be a whole number from 1, or None: {self.top_k!r}")
        if self.weights not in _WEIGHTINGS:
            raise ConfigError(f"weights must be one of {', '.join(_WEIGHTINGS)}: {self.weights!r}")
        if not (is_number(self.temperature) and 0 < self.temperature < math.inf):
            raise ConfigError(f"temperature must be above 0 and finite: {self.temperature!r}")

    def width(self, available: int) -> int:
        """K at a module where so many adapters do something."""
        return available if self.top_k is None else min(self.top_k, available)

    def probabilities(self, scores: Tensor) -> Tensor:
        """(T, E) shares over all adapters: softmax(scores / temperature), or the given weights."""
        if self.weights == "given":
            return scores.exp()
        return torch.softmax(scores / self.temperature, dim=-1)

    def scores(self, probabilities: Tensor) -> Tensor:
        """(T, E) scores that have these shares, up to a constant; below zero counts as zero."""
        logs_TE = probabilities.clamp(min=0).log()
        return logs_TE if self.weights == "given" else logs_TE * self.temperature

    def select(self, scores: Tensor, width: int) -> Tensor:
        """(T, K) numbers of the K = width highest of (T, E) scores, the highest first.

        All of them, where K = E, come in their own order.
        """
        tokens, experts = scores.shape
        if width == experts:
            return torch.arange(experts, device=scores.device).expand(tokens, experts)
        if width == 1:
            return scores.argmax(1, keepdim=True)
        return scores.topk(width, dim=1).indices

    def weigh(self, scores: Tensor) -> Tensor:
        """(T, K) weights of the selected, from their (T, K) scores."""
        if self.weights == "uniform":
            return torch.full_like(scores, 1 / scores.shape[1])
        if self.weights == "given":
            return scores.exp()
        return torch.softmax(scores / self.temperature, dim=-1)


def is_number(value: object) -> bool:
    """Whether a setting is a number, which True is not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def scored(top_k: int | None, weights: Weighting, temperature: float) -> Rule:
    """The rule of a router whose scores are no logarithms of weights.

    Raises:
        ConfigError: A value that is not possible, `given` among them.
    """
    if weights == "given":
        raise ConfigError("weights must be uniform or softmax: 'given' needs given weights")
    return Rule(top_k, weights, temperature)
