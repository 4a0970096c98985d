"""Step sizes and moves: a cosine schedule, gradient descent, Adam.

Entry by entry, so that samples in one tensor do not influence each other. Knows gradients; not
what they are of.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Optimizer = Literal["gd", "adam"]


def cosine(step: int, steps: int, first: float, last: float) -> float:
    """λₜ = last + (first − last)(1 + cos(πt / T)) / 2 for t = 0 … T − 1."""
    return last + (first - last) * (1 + math.cos(math.pi * step / max(1, steps))) / 2


class Mover:
    """Turns gradients into moves, and keeps what Adam needs from one step to the next.

    Args:
        optimizer: `gd`: the move is −λg. `adam` (arXiv 1412.6980): −λ m̂ / (√v̂ + 1e-8) with
            decays 0.9 and 0.999: each entry moves by about λ while its gradient keeps its sign,
            however small that is.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.steps = 0
        self.mean: Tensor | None = None
        self.square: Tensor | None = None

    def move(self, gradient: Tensor, rate: float) -> Tensor:
        """What is to be added, in the shape of the gradient."""
        if self.optimizer == "gd":
            return -rate * gradient
        if self.mean is None or self.square is None:
            self.mean, self.square = torch.zeros_like(gradient), torch.zeros_like(gradient)
        self.steps += 1
        self.mean = self.mean.lerp(gradient, 0.1)
        self.square = self.square.lerp(gradient * gradient, 0.001)
        mean = self.mean / (1 - 0.9**self.steps)
        square = self.square / (1 - 0.999**self.steps)
        return -rate * mean / (square.sqrt() + 1e-8)
