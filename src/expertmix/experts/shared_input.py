"""Modules that read one tensor, and the product that serves all of them, once one asks for it.

Which modules share an input is known from their names (q, k, v; gate, up) and checked at every
call: a module that is given another tensor after all computes its own part.

Legend: T tokens, D width of the input, R directions at one module.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expertmix.experts.shelf import Shelf
from expertmix.experts.sieve import Sieve
from expertmix.experts.stack import Reading, SharedStack
from expertmix.routers.seen import Seen

_TOGETHER = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)
"""Children of one module that transformers' models call with one and the same tensor."""


def groups(widths: Mapping[str, int]) -> tuple[tuple[str, ...], ...]:
    """Modules by the input that they share, in order of first appearance.

    Args:
        widths: Of each module's input: names alone would put RWKV's `key` and `value` together.
    """
    found: dict[tuple[str, object, int], list[str]] = {}
    for module, width in widths.items():
        parent, _, child = module.rpartition(".")
        family = next((names for names in _TOGETHER if child in names), child)
        found.setdefault((parent, family, width), []).append(module)
    return tuple(tuple(members) for members in found.values())


@dataclass(frozen=True, eq=False)
class _Held:
    """A product, and the very tensor that it was computed from."""

    hidden: Any  # a weak reference: holding the tensor would keep it alive
    version: int
    grad: tuple[bool, bool]
    right: Tensor | Sieve
    product: Tensor

    def is_of(self, hidden: Tensor, right: Tensor | Sieve) -> bool:
        """Whether it can be used for this input, unchanged since."""
        return (
            self.hidden() is hidden
            and self.version == _version(hidden)
            and self.grad == _grad(hidden)
            and self.right is right
        )


class SharedInput:
    """The adapters of modules with one input, where and in the type in which it comes.

    Args:
        shelf: All adapters.
        modules: Names of the modules.
        reading: How they are read.
    """

    def __init__(
        self, shelf: Shelf, modules: Iterable[str], *, reading: Reading | None = None
    ) -> None:
        self._shelf = shelf
        self._reading = Reading() if reading is None else reading
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
                    reading=self._reading,
                )
            self._stack = stack
        return stack

    def seen(self, hidden: Tensor, module: str, *, exact: bool = False) -> Seen:
        """What a router sees of a (…, D) input of a module.

        The first module that asks for the product computes it for all, the last one lets go of it.
        Other threads may run the model meanwhile: what is held is replaced as a whole.

        Args:
            hidden: The input.
            module: Name of the module.
            exact: Not roughly, whatever the reading.
        """
        stack = self.stack(hidden)
        own = stack.modules[module]
        flat = hidden.reshape(-1, hidden.shape[-1])
        rows = hidden.shape[0] if hidden.dim() > 2 else 1
        held = self._held
        if module in (self._modules[0], self._modules[-1]):
            self._held = None

        def product(right: Tensor | Sieve) -> Callable[[], Tensor]:
            return lambda: self._product(hidden, right, module, own.columns, held)

        rough = None
        if own.rough is not None and stack.sieve is not None and not exact:
            rough = Seen(flat, own.rough, module=module, rows=rows, product=product(stack.sieve))
        return Seen(
            flat,
            own.directions,
            module=module,
            rows=rows,
            product=product(stack.right),
            rough=rough,
        )

    def _product(
        self,
        hidden: Tensor,
        right: Tensor | Sieve,
        module: str,
        columns: slice,
        held: _Held | None,
    ) -> Tensor:
        """(T, R) for one module, from what is held if it is of this very input."""
        if held is not None and held.is_of(hidden, right):
            return held.product[:, columns]
        if module == self._modules[-1]:
            return _product(hidden, right, columns)
        product = _product(hidden, right, slice(None))
        self._held = _Held(weakref.ref(hidden), _version(hidden), _grad(hidden), right, product)
        return product[:, columns]


def _fits(stack: SharedStack, hidden: Tensor) -> bool:
    return stack.right.device == hidden.device and stack.dtype == hidden.dtype


def _product(hidden: Tensor, right: Tensor | Sieve, columns: slice) -> Tensor:
    """(T, some of R) in the type of the directions."""
    hidden_TD = hidden.reshape(-1, hidden.shape[-1])
    if isinstance(right, Sieve):
        return right.project(hidden_TD, columns)
    return hidden_TD.to(right.dtype) @ right[:, columns]


def _grad(tensor: Tensor) -> tuple[bool, bool]:
    """Whether graphs are recorded, and whether the tensor takes part in one."""
    return torch.is_grad_enabled(), tensor.requires_grad


def _version(tensor: Tensor) -> int:
    """Counts in-place changes; tensors of inference mode do not count them."""
    return 0 if tensor.is_inference() else tensor._version
