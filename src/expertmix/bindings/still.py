"""A model at rest: evaluation mode, and no weight that asks for gradients; both given back.

Gradients of routing pass through a model whose weights want none, at half the price.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def still(model: nn.Module) -> Iterator[None]:
    """Rest for the length of the block."""
    wanting = [one for one in model.parameters() if one.requires_grad]
    training = [module for module in model.modules() if module.training]
    try:
        for one in wanting:
            one.requires_grad_(False)
        for module in training:
            module.training = False
        yield
    finally:
        for one in wanting:
            one.requires_grad_(True)
        for module in training:
            module.training = True
