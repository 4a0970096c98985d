"""The binding for MoE models of transformers: hooks, and nothing but hooks.

While attached it places every pass (which tokens), lets the tap edit what the router selects from
and what the experts get, and reports what the experts really got. It writes to no module and
registers no experts function, so every `experts_implementation` stays as it was. When the block
ends, also after an exception, all hooks are gone.

It does not know what the tap does with all this.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from expertmix.bindings.discovery import Block, find_blocks
from expertmix.bindings.fingerprint import fingerprint
from expertmix.bindings.rescoring import Rescoring
from expertmix.core.intervention import Stage
from expertmix.core.protocols import Tap
from expertmix.core.site import SiteInfo
from expertmix.errors import UnsupportedRuntimeError

_BEFORE_TOP_K = (Stage.LOGITS, Stage.PROBABILITIES, Stage.SELECTION)


class TransformersMoE:
    """A transformers model with MoE blocks, seen as sites.

    Args:
        model: A PreTrainedModel, or a wrapper around one (PEFT's, say). Sites are named as in the
            innermost full model, so a wrapper does not change them.

    Raises:
        NoSitesError: A dense model.
        UnsupportedModelError: A family that routes in another way.
        UnsupportedRuntimeError: A compiled model.
    """

    def __init__(self, model: nn.Module) -> None:
        _refuse_compiled(model)
        self.model = _pretrained(model)
        self.blocks = find_blocks(self.model)

    @property
    def name(self) -> str:
        """Name or path that the model was loaded from."""
        path = getattr(getattr(self.model, "config", None), "name_or_path", "")
        return path.rstrip("/").rpartition("/")[2] or type(self.model).__name__

    @cached_property
    def sites(self) -> tuple[SiteInfo, ...]:
        """One site per MoE block."""
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

    def fingerprint(self) -> str:
        """Hash of structure and weights."""
        return fingerprint(self.model)

    @contextmanager
    def attach(self, tap: Tap) -> Iterator[None]:
        """Hook the model for the length of the block."""
        with ExitStack() as stack:
            for model in self._models():
                _hook_passes(model, tap, stack)
            for block in self.blocks:
                _hook_block(block, tap, stack)
            yield

    def _models(self) -> list[nn.Module]:
        """Every full model around a site: users may call `model` or `model.model`."""
        sites = [info.site.name for info in self.sites]
        return [
            module
            for path, module in self.model.named_modules()
            if _takes_tokens(module)
            and any(site.startswith(f"{path}." if path else "") for site in sites)
        ]


def _pretrained(model: nn.Module) -> nn.Module:
    return next((module for module in model.modules() if _takes_tokens(module)), model)


def _takes_tokens(module: nn.Module) -> bool:
    return "PreTrainedModel" in {base.__name__ for base in type(module).__mro__} and bool(
        {"input_ids", "inputs_embeds"} & set(inspect.signature(module.forward).parameters)
    )


def _refuse_compiled(model: nn.Module) -> None:
    for module in model.modules():
        if type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None:
            raise UnsupportedRuntimeError(
                "the model is compiled (torch.compile): hooks do not run inside a compiled graph. "
                "Record the uncompiled model."
            )


def _keep(stack: ExitStack, handle: RemovableHandle) -> None:
    stack.callback(handle.remove)


def _hook_passes(model: nn.Module, tap: Tap, stack: ExitStack) -> None:
    """The outermost model that runs opens and closes the pass."""
    signature = inspect.signature(model.forward)
    mine = False

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal mine
        if tap.open:
            return
        _refuse_captured()
        given = signature.bind_partial(*args, **kwargs).arguments
        ids_BS, real_BS, continues = _read_inputs({**given, **given.get("kwargs", {})})
        tap.begin(tap.bookkeeper.read(ids_BS, real_BS, continues=continues))
        mine = True

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        nonlocal mine
        if mine:
            mine = False
            tap.abandon() if output is None else tap.end()

    _keep(stack, model.register_forward_pre_hook(before, with_kwargs=True))
    _keep(stack, model.register_forward_hook(after, always_call=True))


def _refuse_captured() -> None:
    if torch.compiler.is_compiling():
        raise UnsupportedRuntimeError(
            "torch.compile is tracing the model: hooks do not run inside a compiled graph. Record "
            "the uncompiled model; with a static cache, call generate(..., disable_compile=True)."
        )
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise UnsupportedRuntimeError("a CUDA graph is being captured: its replays run no hooks")


def _read_inputs(given: dict[str, Any]) -> tuple[Tensor, Tensor, bool]:
    """(B, S) token ids, (B, S) which of them are real, and whether a filled cache goes on."""
    ids_BS = given.get("input_ids")
    if ids_BS is None:
        embeds = given["inputs_embeds"]
        ids_BS = torch.full(embeds.shape[:2], -1, dtype=torch.int64, device=embeds.device)
    cache = given.get("cache", given.get("past_key_values"))
    past = int(cache.get_seq_length()) if cache is not None else 0
    return ids_BS, _real(given.get("attention_mask"), ids_BS, past), past > 0


def _real(mask: Any, ids_BS: Tensor, past: int) -> Tensor:
    """(B, S) bool from a 2-D mask over keys, or from the last query's row of a 4-D one."""
    columns = ids_BS.shape[1]
    if isinstance(mask, dict):
        mask = mask.get("full_attention")
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= columns:
        return mask[:, -columns:].bool().to(ids_BS.device)
    if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[-1] >= past + columns:
        row = mask[:, 0, -1, past : past + columns]
        return (row if row.dtype == torch.bool else row == 0).to(ids_BS.device)
    return torch.ones_like(ids_BS, dtype=torch.bool)


def _hook_block(block: Block, tap: Tap, stack: ExitStack) -> None:
    site = block.info.site
    rescoring = _hook_rescoring(block, tap, stack)

    def edit(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if rescoring is not None:
            rescoring.disarm()
        hidden, indices, weights = _arguments(module, args, kwargs)
        edited_indices, edited_weights = tap.edit_decision(site, _flat(indices), _flat(weights))
        shape = (*indices.shape[:-1], edited_indices.shape[-1])
        return (hidden, _shaped(edited_indices, shape), _shaped(edited_weights, shape)), {}

    def report(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        _, indices, weights = _arguments(module, args, kwargs)
        tap.saw(site, _flat(indices), _flat(weights))

    if rescoring is not None or tap.grad or tap.edits(site, Stage.WEIGHTS):
        _keep(stack, block.experts.register_forward_pre_hook(edit, with_kwargs=True))
    if tap.wants(site):
        _keep(stack, block.experts.register_forward_hook(report, with_kwargs=True))
        if tap.wants_logits():
            _hook_logits(block, tap, stack)


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


def _hook_rescoring(block: Block, tap: Tap, stack: ExitStack) -> Rescoring | None:
    """Let the router's own code choose again, wherever something is edited before top-k."""
    if not any(tap.edits(block.info.site, stage) for stage in _BEFORE_TOP_K):
        return None
    router = _required_router(block)
    rescoring = Rescoring(block, tap)

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        rescoring.leave()

    _keep(stack, block.module.register_forward_pre_hook(lambda module, args: rescoring.enter()))
    _keep(stack, router.register_forward_pre_hook(lambda module, args: rescoring.arm()))
    _keep(stack, block.module.register_forward_hook(leave, always_call=True))
    return rescoring


def _hook_logits(block: Block, tap: Tap, stack: ExitStack) -> None:
    site, experts = block.info.site, block.info.num_experts

    def report(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
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
