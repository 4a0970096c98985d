"""Everybody, equally: the honest baseline."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from expertmix.routers.router import Router
from expertmix.routers.rule import Rule
from expertmix.routers.seen import Seen


@dataclass(frozen=True)
class Uniform(Router):
    """Every adapter that does something at a module, with weight 1 / (how many there are)."""

    @property
    def rule(self) -> Rule:
        """All of them."""
        return Rule(None, "uniform")

    def scores(self, seen: Seen) -> Tensor:
        """(T, E) zeros."""
        experts = len(seen.directions.names)
        return torch.zeros(len(seen.hidden), experts, device=seen.hidden.device)
