"""The binding for MoE models of transformers: hooks, and nothing but hooks.

While attached it places every pass (which tokens), lets the tap edit what the router selects from
and what the experts get, and reports what the experts really got. It writes to no module and
registers no experts function, so every `experts_implementation` stays as it was. When the block
ends, also after an exception, all hooks are gone.

It does not know what the tap does with all this.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from expertmix.bindings.discovery import Block, find_blocks, is_wrapped, takes_decisions
from expertmix.bindings.rescoring import Rescoring
from expertmix.bindings.turns import Turns
from expertmix.core.fingerprint import fingerprint
from expertmix.core.intervention import Stage
from expertmix.core.protocols import Tap
from expertmix.core.site import Site, SiteInfo
from expertmix.errors import InterventionError, UnsupportedRuntimeError
from expertmix.experts.passes import full_models, hook_passes, name_of, refuse_tracing, takes_tokens

_BEFORE_TOP_K = (Stage.LOGITS, Stage.PROBABILITIES, Stage.SELECTION)


class TransformersMoE:
    """A transformers model with MoE blocks, seen as sites.

    Args:
        model: A PreTrainedModel, or a wrapper around one (PEFT's, say). Sites are named as in the
            PreTrainedModel, so a wrapper does not change them.

    Raises:
        NoSitesError: A dense model.
        UnsupportedModelError: A family that routes in another way.
        UnsupportedRuntimeError: A compiled model.
    """

    def __init__(self, model: nn.Module) -> None:
        _refuse_compiled(model)
        self.model = _pretrained(model)
        self.blocks = find_blocks(self.model)
        self._recoveries: list[Callable[[], None]] = []  # of each tap that is attached

    @property
    def name(self) -> str:
        """Name or path that the model was loaded from."""
        return name_of(self.model)

    @cached_property
    def sites(self) -> tuple[SiteInfo, ...]:
        """One site per MoE block; of a chain of experts, one per iteration."""
        return tuple(block.info for block in self.blocks)

    @property
    def settings(self) -> dict[str, str]:
        """Architecture, dtype and experts implementation."""
        config = getattr(self.model, "config", None)
        return {
            "architecture": type(self.model).__name__,
            "dtype": str(next(self.model.parameters()).dtype).removeprefix("torch."),
            "experts_implementation": str(getattr(config, "_experts_implementation", None)),
        }

    @property
    def attached(self) -> bool:
        """Whether a tap is attached now: hooks of `attach` say so, wherever it was called."""
        experts = [block.experts for block in self.blocks]
        hooks = [
            hook
            for one in experts
            for hook in (*one._forward_hooks.values(), *one._forward_pre_hooks.values())
        ]
        return any(getattr(hook, "__module__", None) == __name__ for hook in hooks)

    def fingerprint(self) -> str:
        """Hash of structure and weights."""
        return fingerprint(self.model.state_dict().items())

    @contextmanager
    def attach(self, tap: Tap) -> Iterator[None]:
        """Hook the model for the length of the block."""
        rescorings: list[Rescoring] = []
        with ExitStack() as stack:
            turns = Turns(self.blocks, stack)
            recover = partial(_recover, rescorings, turns)
            self._recoveries.append(recover)
            stack.callback(self._recoveries.remove, recover)
            stack.callback(recover)
            for model in full_models(self.model, (info.site.name for info in self.sites)):
                hook_passes(model, tap, stack, recover=recover)
            for block in self.blocks:
                _hook_block(block, tap, turns, rescorings, stack)
            yield

    def recover(self) -> None:
        """Undo what a pass left half done: torch calls no hook after a KeyboardInterrupt."""
        for recover in self._recoveries:
            recover()


def _pretrained(model: nn.Module) -> nn.Module:
    """The outermost full model that routes, or for want of one the first: it is dense."""
    full = [module for module in model.modules() if takes_tokens(module)]
    routed = (one for one in full if any(takes_decisions(part) for part in one.modules()))
    return next(routed, full[0] if full else model)


def _refuse_compiled(model: nn.Module) -> None:
    for module in model.modules():
        if (
            type(module).__name__ == "OptimizedModule"
            or module._compiled_call_impl is not None
            or getattr(module.forward, "_torchdynamo_orig_callable", None) is not None
        ):
            raise UnsupportedRuntimeError(
                "the model is compiled (torch.compile): hooks do not run inside a compiled graph. "
                "Record the uncompiled model."
            )


def _keep(stack: ExitStack, handle: RemovableHandle) -> None:
    stack.callback(handle.remove)


def _recover(rescorings: list[Rescoring], turns: Turns) -> None:
    for rescoring in reversed(rescorings):
        rescoring.leave()
    turns.forget()


def _hook_block(
    block: Block, tap: Tap, turns: Turns, rescorings: list[Rescoring], stack: ExitStack
) -> None:
    site, here = block.info.site, turns.here(block)
    rescoring = _hook_rescoring(block, tap, turns, stack)
    if rescoring is not None:
        rescorings.append(rescoring)

    def edit(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        refuse_tracing()
        if not here():
            return args, kwargs
        if rescoring is not None:
            rescoring.disarm()
        hidden, indices, weights = _arguments(module, args, kwargs)
        if block.held:
            _refuse_unlike(block, tap, indices)
        if tap.grad and block.chain is not None:  # iterations may share them, gradients may not
            weights = weights.view_as(weights)
        edited_indices, edited_weights = tap.edit_decision(site, _flat(indices), _flat(weights))
        shape = (*indices.shape[:-1], edited_indices.shape[-1])
        return (hidden, _shaped(edited_indices, shape), _shaped(edited_weights, shape)), {}

    def report(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        refuse_tracing()
        if here():
            _, indices, weights = _arguments(module, args, kwargs)
            tap.saw(site, _flat(indices), _flat(weights))

    if tap.grad or any(tap.edits(site, stage) for stage in (*_BEFORE_TOP_K, Stage.WEIGHTS)):
        _keep(stack, block.experts.register_forward_pre_hook(edit, with_kwargs=True))
    if tap.wants(site):
        _keep(stack, block.experts.register_forward_hook(report, with_kwargs=True))
        if tap.wants_logits():
            _hook_logits(block, tap, turns, stack)


def _flat(values: Tensor) -> Tensor:
    """(T, K); the very tensor where it has that shape, so that gradients arrive at it."""
    return values if values.dim() == 2 else values.reshape(-1, values.shape[-1])


def _shaped(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    return values if values.shape == shape else values.view(shape)


def _arguments(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    if len(args) == 3:
        return args
    bound = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    hidden, indices, weights = bound.values()
    return hidden, indices, weights


def _hook_rescoring(block: Block, tap: Tap, turns: Turns, stack: ExitStack) -> Rescoring | None:
    """Let the router's own code choose again, wherever something is edited before top-k."""
    if block.held or not any(tap.edits(block.info.site, stage) for stage in _BEFORE_TOP_K):
        return None
    router = _required_router(block)
    rescoring, here = Rescoring(block, tap), turns.here(block)

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        if here():
            rescoring.enter()

    def arm(module: nn.Module, args: tuple[Any, ...]) -> None:
        if here():
            rescoring.arm()

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        rescoring.leave()

    _keep(stack, block.module.register_forward_pre_hook(enter))
    _keep(stack, router.register_forward_pre_hook(arm))
    _keep(stack, block.module.register_forward_hook(leave, always_call=True))
    if is_wrapped(block.gate):  # its linear map is not the whole of it: edit what comes out
        _keep(
            stack, block.gate.register_forward_hook(lambda module, args, out: rescoring.gate(out))
        )
    return rescoring


def _refuse_unlike(block: Block, tap: Tap, indices: Tensor) -> None:
    """A kept decision obeys what was asked of the first iteration, and can obey nothing else.

    Raises:
        InterventionError: Before selection, something else is asked for.
    """
    site, first = block.info.site, Site(block.info.site.name)
    tokens, experts = indices.numel() // indices.shape[-1], block.info.num_experts
    probe_TE = torch.arange(tokens * experts, device=indices.device).sin().view(tokens, experts)
    for stage in _BEFORE_TOP_K:
        if not tap.edits(site, stage):
            continue
        asked_TE = tap.edit_scores(site, stage, probe_TE)
        kept_TE = tap.edit_scores(first, stage, probe_TE) if tap.edits(first, stage) else probe_TE
        if not torch.equal(asked_TE, kept_TE):
            raise InterventionError(
                f"{site} keeps the decision of {first} (gating='fixed') and asks no router: before "
                f"selection, nothing can be edited there alone. Edit {first.name!r}, which is all "
                f"iterations, or use Ablate, or Reweight at the stage 'weights'."
            )


def _hook_logits(block: Block, tap: Tap, turns: Turns, stack: ExitStack) -> None:
    site, experts, routing = block.info.site, block.info.num_experts, turns.routing(block)

    def report(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not routing():
            return
        logits = output[0] if isinstance(output, tuple) else output
        tap.saw_logits(site, logits.reshape(-1, logits.shape[-1])[:, :experts])

    if block.gate is not None:  # reports first; some routers return probabilities instead
        _keep(stack, block.gate.register_forward_hook(report))
    _keep(stack, _required_router(block).register_forward_hook(report))


def _required_router(block: Block) -> nn.Module:
    if block.router is None:
        raise UnsupportedRuntimeError(
            f"no router was found beside the experts at {block.info.site}: its logits cannot be "
            f"recorded or edited. Ablate, Replay and Reweight at the stage 'weights' work."
        )
    return block.router
