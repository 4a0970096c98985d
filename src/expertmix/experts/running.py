"""One pass through a composed model: which plan it started with, and what its router remembers.

A pass keeps its plan to its end, whoever changes the model meanwhile; one thread's pass is not
another's. Hooks only.

Legend: B rows of the batch, S columns of this pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import nn

from expertmix.experts.carried import cache_in, evidence_in, keep_evidence
from expertmix.experts.passes import read_inputs, untraced
from expertmix.experts.plan import Plan
from expertmix.routers.memory import Memory


@dataclass(frozen=True, eq=False)
class Running:
    """A pass.

    Attributes:
        plan: The plan with which it started.
        memory: Of its router, where that has one.
        model: The model whose call opened it: outer models only.
        given: The arguments of that call.
    """

    plan: Plan
    memory: Memory | None
    model: nn.Module
    given: dict[str, Any]

    @property
    def at(self) -> tuple[Plan, Memory | None]:
        """What a module needs of it."""
        return self.plan, self.memory

    def end(self, output: Any) -> None:
        """Keep in the cache what the next pass will need."""
        if self.memory is None or self.memory.empty:
            return
        cache = cache_in([*self.given.values(), *_values(output)])
        if cache is not None:
            keep_evidence(cache, self.plan, self.memory.past())


@contextmanager
def passes(
    model: nn.Module, running: ContextVar[Running | None], latest: Callable[[], Plan | None]
) -> Iterator[None]:
    """Open and close the passes that start with a call of this full model.

    Args:
        model: Full model.
        running: Where the pass of each thread is noted.
        latest: Gives the plan of a pass that starts now, or None for a pass of the base alone.
    """
    signature = inspect.signature(model.forward)

    @untraced
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        outer = running.get()
        # torch calls no hook after a KeyboardInterrupt: then the own pass is still there
        if outer is None or outer.model is module:
            plan, given = latest(), signature.bind_partial(*args, **kwargs).arguments
            given = {**given, **given.get("kwargs", {})}
            running.set(None if plan is None else _begun(module, plan, given))

    @untraced
    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        own = running.get()
        if own is not None and own.model is module:
            running.set(None)
            if output is not None:  # else it failed
                own.end(output)

    hooks = (
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(after, always_call=True),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _begun(model: nn.Module, plan: Plan, given: dict[str, Any]) -> Running:
    if not plan.router.remembers:
        return Running(plan, None, model, {})
    _, real_BS, _ = read_inputs(given)
    past = evidence_in(cache_in(given.values()), plan, len(real_BS))
    return Running(plan, plan.router.memory(real_BS, past), model, given)


def _values(output: Any) -> Iterable[Any]:
    values: Iterable[Any] = output.values() if isinstance(output, dict) else output
    return values
