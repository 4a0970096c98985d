"""Where a number went wrong first: the failing batch once more, with every module watched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


def first_nonfinite(model: nn.Module, run: Callable[[], Any]) -> str:
    """The first module, in the order in which they end, that gives NaN or infinity; in words.

    Args:
        model: Whose modules are watched.
        run: Runs the failing batch; its result is not looked at.
    """
    broken = nonfinite_weights(model)
    if broken is not None:
        return f"the weights {broken} are not finite themselves"
    found: list[str] = []

    def hook(name: str) -> Callable[..., None]:
        def look(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            if not found and not all(_finite(one) for one in _tensors(output)):
                found.append(f"{name} ({type(module).__name__})")

        return look

    handles = [
        module.register_forward_hook(hook(name or "the model"), with_kwargs=True)
        for name, module in model.named_modules()
    ]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        return "all activations are finite: the loss itself is not"
    return f"the first activation that is not finite is that of {found[0]}"


def nonfinite_weights(model: nn.Module) -> str | None:
    """The first parameter that holds NaN or infinity, or None."""
    return next((name for name, one in model.named_parameters() if not _finite(one)), None)


def first_nonfinite_gradient(model: nn.Module) -> str:
    """The last module in the order of the pass whose gradient is not finite: backward's first."""
    names = [
        name
        for name, one in model.named_parameters()
        if one.grad is not None and not _finite(one.grad)
    ]
    return names[-1] if names else "none that is left"


def _finite(values: Tensor) -> bool:
    return bool(torch.isfinite(values).all()) if values.is_floating_point() else True


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from _tensors(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)
