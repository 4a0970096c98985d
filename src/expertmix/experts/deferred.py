"""One weight gradient over all calls of the same experts.

A chain calls its experts C times. Autograd alone writes a dense gradient of all experts per call
and adds these up, which is most of the price of training a chain. Inside `one_gradient()`, all
calls write into one gradient, and few rows wait until all are there, for one product per expert.

Calls read a weight through one node of the graph, and autograd runs a node when everything that it
feeds is done: so it does not matter in which order iterations come back, whether all of them do,
or whether they are computed again from a checkpoint.

Knows factors of gradients; no chain, and not what an expert is made of.

Legend: E experts, O rows and I columns of a weight, b pairs of one expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from expertmix.experts.blocks import gather

_WAITS = 4  # times smaller: then keeping and joining blocks costs less than to add onto a gradient


class WeightGradient:
    """The gradient of all experts' weights while it is made: Σ leftᵀ · right of each expert.

    Args:
        weight_EOI: Of what.
        patient: Whether blocks much smaller than the gradient they make wait for others.
    """

    def __init__(self, weight_EOI: Tensor, *, patient: bool) -> None:
        self._made_EOI = torch.empty_like(weight_EOI, memory_format=torch.contiguous_format)
        self._patient = patient
        self._written: set[int] = set()
        self._waiting: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def add(self, expert: int, left_bO: Tensor, right_bI: Tensor) -> None:
        """Let an expert have leftᵀ · right."""
        outputs, inputs = left_bO.shape[1], right_bI.shape[1]
        if self._patient and _WAITS * len(left_bO) * (outputs + inputs) < outputs * inputs:
            self._waiting.setdefault(expert, []).append((left_bO, right_bI))
        else:
            self._write(expert, left_bO, right_bI)

    def finish(self) -> Tensor:
        """(E, O, I); zero for an expert that nobody called."""
        for expert, parts in self._waiting.items():
            left_bO, right_bI = (torch.cat(one) for one in zip(*parts, strict=True))
            self._write(expert, left_bO, right_bI)
        for expert, made_OI in enumerate(self._made_EOI):
            if expert not in self._written:
                made_OI.zero_()
        return self._made_EOI

    def _write(self, expert: int, left_bO: Tensor, right_bI: Tensor) -> None:
        gather(left_bO, right_bI, self._made_EOI[expert], onto=expert in self._written)
        self._written.add(expert)


class Shelf:
    """Where all calls find the gradient of one weight while a backward runs."""

    def __init__(self) -> None:
        self._task = -1
        self._gradient: WeightGradient | None = None

    def gradient(self, weight_EOI: Tensor) -> WeightGradient:
        """Of the backward that runs; begun by the first call that asks."""
        task: int = torch._C._current_graph_task_id()
        if self._gradient is None or task != self._task:  # one that asked for no weight may be left
            self._task = task
            self._gradient = WeightGradient(weight_EOI, patient=True)
        return self._gradient

    def take(self) -> Tensor | None:
        """What the backward that runs has made, or None; the shelf is empty then."""
        found, self._gradient = self._gradient, None
        if found is None or self._task != torch._C._current_graph_task_id():
            return None
        return found.finish()


@dataclass(frozen=True)
class Ledger:
    """The weights that were read in one `one_gradient()`, each with its shelf, by id."""

    read: dict[int, tuple[Tensor, Shelf]] = field(default_factory=dict)


_LEDGER: ContextVar[Ledger | None] = ContextVar("expertmix_ledger", default=None)


@contextmanager
def one_gradient() -> Iterator[None]:
    """Calls of experts inside share one gradient per weight."""
    token = _LEDGER.set(Ledger())
    try:
        yield
    finally:
        _LEDGER.reset(token)


def shared(weight_EOI: Tensor) -> tuple[Tensor, Shelf | None]:
    """The weight as a call is to read it, and where its gradient is: None to return it."""
    ledger = _LEDGER.get()
    if ledger is None or not weight_EOI.requires_grad:
        return weight_EOI, None
    if id(weight_EOI) not in ledger.read:
        shelf, apply = Shelf(), cast(Any, _Read.apply)
        ledger.read[id(weight_EOI)] = apply(weight_EOI, shelf), shelf
    return ledger.read[id(weight_EOI)]


def gradient_of(weight_EOI: Tensor, shelf: Shelf | None) -> WeightGradient:
    """Where a call, in its backward, adds to the gradient of a weight."""
    return (
        WeightGradient(weight_EOI, patient=False) if shelf is None else shelf.gradient(weight_EOI)
    )


def finished(gradient: WeightGradient | None, shelf: Shelf | None) -> Tensor | None:
    """What that call returns: nothing while others may still add to it."""
    return None if gradient is None or shelf is not None else gradient.finish()


class _Read(torch.autograd.Function):
    """A weight as it is; backward, the gradient that its calls have made."""

    @staticmethod
    def forward(ctx: Any, weight_EOI: Tensor, shelf: Shelf) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.shelf = shelf
        return weight_EOI.view_as(weight_EOI)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: None) -> tuple[Tensor | None, None]:
        return ctx.shelf.take(), None
