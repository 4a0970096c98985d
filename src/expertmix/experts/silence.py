"""PEFT's own adapters, put to rest while a shelf stands in for them.

Knows PEFT's layers. What it changes it gives back: whether adapters are on, and which parameters
are trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from expertmix.errors import CheckpointError


@contextmanager
def silenced(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Switch the adapters of PEFT's layers off for the length of the block.

    Raises:
        CheckpointError: One is merged into the base, which would then not be the base.
    """
    for layer in layers:
        _refuse_merged(layer)
    before = [(layer, _disabled(layer), _trained(layer)) for layer in layers]
    try:
        for layer in layers:
            _enable(layer, on=False)
        yield
    finally:
        for layer, disabled, trained in before:
            _enable(layer, on=not disabled)
            for parameter, wanted in trained:
                parameter.requires_grad_(wanted)


def _refuse_merged(layer: Any) -> None:
    if layer.merged:
        raise CheckpointError(
            f"adapter {layer.merged_adapters[0]!r} is merged into the base: merged adapters cannot "
            f"be routed. Call model.unmerge_adapter() first."
        )


def _enable(layer: Any, *, on: bool) -> None:
    layer.enable_adapters(on)


def _disabled(layer: Any) -> bool:
    return bool(layer.disable_adapters)


def _trained(layer: nn.Module) -> list[tuple[nn.Parameter, bool]]:
    return [(parameter, parameter.requires_grad) for parameter in layer.parameters()]
