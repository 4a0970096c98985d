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
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from torch import Tensor, nn

from expertmix.core.protocols import Tap
from expertmix.core.site import SiteInfo
from expertmix.errors import ConfigError, UnsupportedModelError, UnsupportedRuntimeError
from expertmix.experts.fingerprint import fingerprint
from expertmix.experts.fused import Combination
from expertmix.experts.passes import (
    full_models,
    hook_passes,
    name_of,
    refuse_two_texts,
    untraced,
)
from expertmix.experts.places import Place, pretrained
from expertmix.experts.plan import Plan
from expertmix.experts.running import Running, passes
from expertmix.experts.shelf import Shelf
from expertmix.experts.silence import silenced
from expertmix.experts.stack import Projections
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
        projections: How a router's inputs are projected, where it scores by all directions. None
            chooses: `sieved` (one product in bfloat16 names candidates, exact ones decide among
            them) where the shelf is large and the processor multiplies bfloat16 natively, else
            `exact`. A type: in that type, for scores and on the way down.

    Raises:
        CheckpointError: An adapter does not fit the model; the model is as it was.
        ConfigError: The router does not fit the shelf, or an unknown combination.
        UnsupportedModelError: An encoder with a decoder, and a router with a memory.

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
        projections: Projections = None,
    ) -> None:
        self.model = pretrained(model)
        if Composed.of(self.model) is not None:
            raise ConfigError(
                "the model has a shelf on it already: change that one (expertmix.compose again, or "
                "Composed.of(model).change), or uninstall it first"
            )
        self._taps: tuple[Tap, ...] = ()
        self._hooked: set[str] = set()
        self._uninstalled = False
        self._pinned: ContextVar[Plan | None] = ContextVar("plan", default=None)
        self._running: ContextVar[Running | None] = ContextVar("running", default=None)
        self._resting = ContextVar("resting", default=False)
        self._plan = Plan.lay(self.model, shelf, router, combination, projections)
        _refuse_memory_of_two_texts(self.model, router)
        self._installed = ExitStack()
        for module in full_models(self.model, self._plan.infos):
            self._installed.enter_context(passes(module, self._running, self._starting))
        self._install(self._plan)

    @classmethod
    def of(cls, model: nn.Module) -> Composed | None:
        """What is on a model, or None.

        Raises:
            UnsupportedRuntimeError: The model is a copy of a composed one: its adapters act, but
                what they do is seen and changed at the original only.
        """
        hooks = (hook for module in model.modules() for hook in module._forward_hooks.values())
        found = next((hook.composed for hook in hooks if isinstance(hook, _Adding)), None)
        if found is not None and all(module is not found.model for module in model.modules()):
            raise UnsupportedRuntimeError(
                "the model is a copy of a composed one, and shares its shelf: copy the base first, "
                "then compose the copy"
            )
        return found

    @property
    def plan(self) -> Plan:
        """What acts on a pass that starts here and now: the pinned one, or the latest."""
        return self._pinned.get() or self._plan

    def _starting(self) -> Plan | None:
        return None if self._resting.get() else self.plan

    def change(self, *, shelf: Shelf | None = None, router: Router | None = None) -> None:
        """Put another shelf or router on the live model, all at once or not at all.

        Runs inside of `pinned` go on with what they started with. A calibrated router is of one
        shelf: `compose`, called again on the model, changes the shelf and calibrates anew.

        Raises:
            CheckpointError: An adapter does not fit the model; everything is as it was.
            ConfigError: The router does not fit the shelf; everything is as it was.
            UnsupportedRuntimeError: A recording is open: its sites would change under it.
        """
        old = self._plan
        self.put(
            Plan.lay(
                self.model,
                old.shelf if shelf is None else shelf,
                old.router if router is None else router,
                old.combination,
                old.projections,
            )
        )

    def put(self, plan: Plan) -> None:
        """`change` all of it at once, to what was laid out for this model.

        Raises:
            ConfigError: It was uninstalled.
            UnsupportedModelError: An encoder with a decoder, and a router with a memory.
            UnsupportedRuntimeError: A recording is open: its sites would change under it.
        """
        if self._uninstalled:
            raise ConfigError(
                "the shelf was taken off the model: put one on with expertmix.compose"
            )
        if self._taps:
            raise UnsupportedRuntimeError(
                "a recording is open, and its sites would change under it: leave the record block, "
                "then change the shelf or the router"
            )
        _refuse_memory_of_two_texts(self.model, plan.router)
        self._install(plan)
        self._plan = plan

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

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Be the base model, without adapters, for all that this thread runs in the block."""
        token = self._resting.set(True)
        try:
            yield
        finally:
            self._resting.reset(token)

    def _install(self, plan: Plan) -> None:
        """Hook the places that are not hooked yet."""
        new = [place for place in plan.places if place.name not in self._hooked]
        wrappers = [place.wrapper for place in new if place.wrapper is not None]
        self._installed.enter_context(silenced(wrappers))
        for place in new:
            self._hook(place)
            self._hooked.add(place.name)

    def _hook(self, place: Place) -> None:
        handle = place.linear.register_forward_hook(_Adding(self, place.name), with_kwargs=True)
        self._installed.callback(handle.remove)

    def added(self, module: str, hidden: Tensor) -> Tensor | None:
        """What the adapters add to a module's output for its (…, D) input; None for nothing."""
        if self._resting.get():
            return None
        running = self._running.get()
        plan, memory = (self.plan, None) if running is None else running.at
        return plan.added(module, hidden, self._taps, memory)

    def uninstall(self) -> None:
        """Take all hooks off; the model is what it was. A second call does nothing."""
        self._uninstalled = True
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

    @property
    def attached(self) -> bool:
        """Whether a tap is attached now."""
        return bool(self._taps)

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


def _refuse_memory_of_two_texts(model: nn.Module, router: Router) -> None:
    if router.remembers:
        refuse_two_texts(model, f"{type(router).__name__}, which gathers evidence over a text,")


@dataclass(frozen=True, eq=False)
class _Adding:
    """A forward hook that adds what the adapters add; by it a composed model is known."""

    composed: Composed
    module: str

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # a copied model goes on with the same shelf

    @untraced
    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        if not isinstance(output, Tensor):
            raise UnsupportedModelError(
                f"module {self.module!r} gives a {type(output).__name__}, no tensor (a router, "
                f"say), and an adapter cannot be added to that: leave it out of the adapters"
            )
        hidden: Tensor = args[0] if args else next(iter(kwargs.values()))
        added = self.composed.added(self.module, hidden)
        return output if added is None else output + added.view(output.shape).to(output.dtype)
