"""A model at rest: evaluation mode, and no weight that asks for gradients; both given back.

Gradients of routing pass through a model whose weights want none, at half the price. Nobody else
may listen to it meanwhile: passes over late layers alone are no passes to a recording.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from expertmix.bindings.both import Both
from expertmix.bindings.transformers import TransformersMoE
from expertmix.errors import UnsupportedRuntimeError
from expertmix.experts.composed import Composed


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


def refuse_attached(routed: TransformersMoE | Composed | Both) -> None:
    """Refuse a model that somebody listens to.

    Raises:
        UnsupportedRuntimeError: Somebody does.
    """
    if routed.attached:
        raise UnsupportedRuntimeError(
            f"{routed.name} is inside a record block, or open for other pathways, already: leave "
            f"that block first. Recording inside of open pathways works."
        )
