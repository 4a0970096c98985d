"""A model with a shelf of adapters on it, routed: `Composed`.

Hooks on the adapted linear modules add what the router selects; the model stays the transformers
model it was, with `forward`, `generate` and caches, and `uninstall` gives it back bit for bit. It
is `Routed`: every adapted module is a site, the adapters are its experts, numbered as on the shelf.

It knows neither how a router scores nor what a tap does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from expertmix.core.protocols import Tap
from expertmix.core.site import SiteInfo
from expertmix.errors import UnsupportedRuntimeError
from expertmix.experts.fingerprint import fingerprint
from expertmix.experts.fused import Combination
from expertmix.experts.passes import full_models, hook_passes, name_of
from expertmix.experts.places import Place, pretrained
from expertmix.experts.plan import Plan
from expertmix.experts.shelf import Shelf
from expertmix.experts.silence import silenced
from expertmix.routers.router import Router


class Composed:
    """A base model whose adapters are chosen per token and module.

    Installed when it is made; also a context manager that uninstalls at the end.

    Args:
        model: A transformers model, or a PeftModel around one, whose own adapters then rest until
            `uninstall`. It is changed in place, by hooks only.
        shelf: The adapters.
        router: Who decides.
        combination: `outputs`, Σ w_i B_i A_i x, or `aligned`, (Σ w_i B*_i)(Σ w_i A*_i) x.
        projections: The type in which inputs are projected, for scores and on the way down. None
            is the input's own. `torch.bfloat16` on a float32 model halves the memory that a step
            reads, and is several times faster where the processor multiplies it natively; a few
            near ties are then decided otherwise.

    Raises:
        CheckpointError: An adapter does not fit the model; the model is as it was.
        ConfigError: The router does not fit the shelf, or an unknown combination.

    Example:
        >>> shelf = Shelf.open("adapters/")
        >>> with Composed(model, shelf, SpectR(top_k=3)) as composed:
        ...     with record(composed) as trace:
        ...         model.generate(**inputs)
    """

    def __init__(
        self,
        model: nn.Module,
        shelf: Shelf,
        router: Router,
        *,
        combination: Combination = "outputs",
        projections: torch.dtype | None = None,
    ) -> None:
        self.model = pretrained(model)
        self._taps: tuple[Tap, ...] = ()
        self._hooked: set[str] = set()
        self._pinned: ContextVar[Plan | None] = ContextVar("plan", default=None)
        self._plan = Plan.lay(self.model, shelf, router, combination, projections)
        self._installed = ExitStack()
        self._install(self._plan)

    @property
    def plan(self) -> Plan:
        """What acts here and now: the pinned plan inside of `pinned`, else the latest."""
        return self._pinned.get() or self._plan

    def change(self, *, shelf: Shelf | None = None, router: Router | None = None) -> None:
        """Put another shelf or router on the live model, all at once or not at all.

        Runs inside of `pinned` go on with what they started with.

        Raises:
            CheckpointError: An adapter does not fit the model; everything is as it was.
            ConfigError: The router does not fit the shelf; everything is as it was.
            UnsupportedRuntimeError: A recording is open: its sites would change under it.
        """
        if self._taps:
            raise UnsupportedRuntimeError(
                "a recording is open, and its sites would change under it: leave the record block, "
                "then change the shelf or the router"
            )
        old = self._plan
        new = Plan.lay(
            self.model,
            old.shelf if shelf is None else shelf,
            old.router if router is None else router,
            old.combination,
            old.projections,
        )
        self._install(new)
        self._plan = new

    @contextmanager
    def pinned(self) -> Iterator[None]:
        """Keep the shelf and the router of now for everything that this thread runs in the block.

        Wrap one request (a `generate`, say) in it where others may call `change` meanwhile.
        """
        token = self._pinned.set(self.plan)
        try:
            yield
        finally:
            self._pinned.reset(token)

    def _install(self, plan: Plan) -> None:
        """Hook the places that are not hooked yet."""
        new = [place for place in plan.places if place.name not in self._hooked]
        wrappers = [place.wrapper for place in new if place.wrapper is not None]
        self._installed.enter_context(silenced(wrappers))
        for place in new:
            self._hook(place)
            self._hooked.add(place.name)

    def _hook(self, place: Place) -> None:
        def add(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
        ) -> Tensor:
            hidden: Tensor = args[0] if args else next(iter(kwargs.values()))
            added = self.plan.added(place.name, hidden, self._taps)
            return output if added is None else output + added.view(output.shape).to(output.dtype)

        handle = place.linear.register_forward_hook(add, with_kwargs=True)
        self._installed.callback(handle.remove)

    def uninstall(self) -> None:
        """Take all hooks off; the model is what it was. A second call does nothing."""
        self._installed.close()
        self._hooked.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.uninstall()

    @property
    def name(self) -> str:
        """Name or path of the base, and how many adapters there are."""
        return f"{name_of(self.model)} + {len(self.plan.shelf)} adapters"

    @property
    def sites(self) -> tuple[SiteInfo, ...]:
        """One site per adapted module, in the model's order."""
        return tuple(self.plan.infos.values())

    @property
    def settings(self) -> dict[str, str]:
        """Architecture, dtype, router and combination."""
        return {
            "architecture": type(self.model).__name__,
            "dtype": str(next(self.model.parameters()).dtype).removeprefix("torch."),
            "router": repr(self.plan.router),
            "combination": self.plan.combination,
            "projections": str(self.plan.projections).removeprefix("torch."),
        }

    def fingerprint(self) -> str:
        """Hash of the base, the adapters and the combination; not of the router."""
        return fingerprint(self.model, self.plan.shelf, self.plan.combination)

    @contextmanager
    def attach(self, tap: Tap) -> Iterator[None]:
        """Report to the tap while the context is open; leave nothing behind."""
        with ExitStack() as stack:
            for model in full_models(self.model, self.plan.infos):
                hook_passes(model, tap, stack)
            stack.callback(self._detach, tap)
            self._taps = (*self._taps, tap)
            yield

    def _detach(self, tap: Tap) -> None:
        self._taps = tuple(other for other in self._taps if other is not tap)
