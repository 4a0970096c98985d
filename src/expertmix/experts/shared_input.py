"""Modules that read one tensor, and the product that serves all of them.

Which modules share an input is known from their names (q, k, v; gate, up) and checked at every
call: a module that is given another tensor after all computes its own part.

Legend: T tokens, D width of the input, R directions at one module.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expertmix.experts.shelf import Shelf
from expertmix.experts.stack import SharedStack

_TOGETHER = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)
"""Children of one module that transformers' models call with one and the same tensor."""


def groups(modules: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Modules by the input that they share, in order of first appearance."""
    found: dict[tuple[str, object], list[str]] = {}
    for module in modules:
        parent, _, child = module.rpartition(".")
        family = next((names for names in _TOGETHER if child in names), child)
        found.setdefault((parent, family), []).append(module)
    return tuple(tuple(members) for members in found.values())


@dataclass(frozen=True, eq=False)
class _Held:
    """A product, and the very tensor that it was computed from."""

    hidden: Any  # a weak reference: holding the tensor would keep it alive
    version: int
    grad: bool
    stack: SharedStack
    product: Tensor

    def is_of(self, hidden: Tensor, stack: SharedStack) -> bool:
        """Whether it can be used for this input, unchanged since."""
        return (
            self.hidden() is hidden
            and self.version == _version(hidden)
            and self.grad == torch.is_grad_enabled()
            and self.stack is stack
        )


class SharedInput:
    """The adapters of modules with one input, where and in the type in which it comes.

    Args:
        shelf: All adapters.
        modules: Names of the modules.
        dtype: In which inputs are projected; None for their own.
    """

    def __init__(
        self, shelf: Shelf, modules: Iterable[str], *, dtype: torch.dtype | None = None
    ) -> None:
        self._shelf = shelf
        self._dtype = dtype
        self._modules = tuple(modules)
        self._stack: SharedStack | None = None
        self._held: _Held | None = None

    def stack(self, hidden: Tensor) -> SharedStack:
        """The stacked adapters on the input's device, in its type; only the latest is kept."""
        stack = self._stack
        if stack is None or not _fits(stack, hidden):
            with torch.inference_mode(False):  # its tensors could not serve a later backward
                stack = SharedStack.build(
                    self._shelf,
                    self._modules,
                    device=hidden.device,
                    dtype=hidden.dtype,
                    projections=self._dtype,
                )
            self._stack = stack
        return stack

    def project(self, hidden: Tensor, module: str) -> Tensor:
        """(T, R) projections for one module from a (…, D) input.

        The first module of the group computes them for all, the last one lets go of them. Other
        threads may run the model meanwhile: what is held is replaced as a whole.
        """
        stack = self.stack(hidden)
        columns = stack.modules[module].columns
        if len(self._modules) == 1:
            return _product(hidden, stack.right)
        held = self._held
        if module == self._modules[0]:
            product = _product(hidden, stack.right)
            self._held = _Held(
                weakref.ref(hidden), _version(hidden), torch.is_grad_enabled(), stack, product
            )
            return product[:, columns]
        if module == self._modules[-1]:
            self._held = None
        if held is not None and held.is_of(hidden, stack):
            return held.product[:, columns]
        return _product(hidden, stack.right[:, columns])


def _fits(stack: SharedStack, hidden: Tensor) -> bool:
    return stack.right.device == hidden.device and stack.dtype == hidden.dtype


def _product(hidden: Tensor, right: Tensor) -> Tensor:
    """(T, R) in the type of the directions."""
    return hidden.reshape(-1, hidden.shape[-1]).to(right.dtype) @ right


def _version(tensor: Tensor) -> int:
    """Counts in-place changes; tensors of inference mode do not count them."""
    return 0 if tensor.is_inference() else tensor._version
