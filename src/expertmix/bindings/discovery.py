"""Where a transformers model routes, found by structure and not by a list of class names.

A routed block holds an *experts* module, whose forward takes (hidden_states, expert numbers,
weights), and a *router* beside it, whose gate has one row per expert. Nearly every MoE of
transformers 5 looks like this. A chain of experts is our own: each of its iterations is a block.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

from torch import nn

from expertmix.bindings.families import UNSUPPORTED
from expertmix.core.site import Site, SiteInfo
from expertmix.errors import NoSitesError, UnsupportedModelError
from expertmix.experts.chain import Chain

_INDEX_WORDS = ("index", "indices", "selected_experts")
_TOP_K_NAMES = ("top_k", "num_experts_per_tok", "moe_top_k", "top_k_experts")


@dataclass(frozen=True, eq=False)
class Block:
    """A routed block of a model.

    Attributes:
        info: Its site.
        module: The block itself, inside of which router and experts run one after the other; of a
            chain, the iteration that runs, which may be the same for several.
        experts: The module that gets (hidden, indices, weights).
        router: The module that computes the logits, or None where it could not be told.
        gate: The linear map of the router, where it is a module of its own.
        width: Rows of the gate; more than E where the router also scores something else.
        chain: Whose iteration it is, and shares its experts with the others; `site.step` says
            which one. None of a plain MoE.
        held: Whether it keeps the decision of the first iteration, and asks no router.
    """

    info: SiteInfo
    module: nn.Module
    experts: nn.Module
    router: nn.Module | None
    gate: nn.Module | None
    width: int
    chain: Chain | None = None
    held: bool = False


def find_blocks(model: nn.Module) -> tuple[Block, ...]:
    """All routed blocks of a model, in the order in which they run: of a chain, its iterations.

    Raises:
        UnsupportedModelError: A family that routes in another way.
        NoSitesError: A dense model.
    """
    return tuple(one for block in find_layers(model) for one in _iterations(block))


def find_layers(model: nn.Module) -> tuple[Block, ...]:
    """One block per experts module, in the order of the model's modules; a chain is one of them.

    Raises:
        UnsupportedModelError: A family that routes in another way.
        NoSitesError: A dense model.
    """
    modules = dict(model.named_modules())
    blocks = tuple(_blocks(model, modules))
    for module in modules.values():
        reason = UNSUPPORTED.get(type(module).__name__)
        if reason:
            raise UnsupportedModelError(
                f"{type(model).__name__} routes in a way that cannot be recorded faithfully: "
                f"{reason} ({type(module).__name__}). See docs/models.md."
            )
    if not blocks:
        raise NoSitesError(
            f"{type(model).__name__} has no routed layer: it is a dense model. Use a MoE model, or "
            f"make one from it and its LoRA adapters with `expertmix convert`."
        )
    return blocks


def _blocks(model: nn.Module, modules: dict[str, nn.Module]) -> Iterator[Block]:
    names = _expert_names(model)
    for path, experts in modules.items():
        if not path or not takes_decisions(experts) or type(experts).__name__ in UNSUPPORTED:
            continue
        parent_path = _parent_path(path, modules)
        parent = modules[parent_path]
        router = _router(parent)
        gate, width = _gate(router)
        count = _number(experts, ("total_experts", "num_experts")) or width
        top_k = _top_k(router, parent, model)
        info = SiteInfo(Site(parent_path), count, top_k, names if len(names) == count else ())
        yield Block(info, parent, experts, router, gate, width)


def _iterations(block: Block) -> Iterator[Block]:
    chain = block.module
    if not isinstance(chain, Chain):
        yield block
        return
    for number in range(chain.depth):
        router = _unwrapped(chain.gate_of(number))
        gate, width = _gate(router)
        info = replace(block.info, site=Site(block.info.site.name, number))
        held = number > 0 and chain.config.gating == "fixed"
        module = chain.iteration(number)
        yield Block(info, module, block.experts, router, gate, width, chain, held)


def takes_decisions(module: nn.Module) -> bool:
    """Whether forward takes (hidden_states, expert numbers, weights) and nothing else."""
    if isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential):
        return False
    names = list(inspect.signature(module.forward).parameters)
    return (
        len(names) == 3
        and names[0] == "hidden_states"
        and any(word in names[1] for word in _INDEX_WORDS)
        and "weight" in names[2]
    )


def is_wrapped(module: nn.Module | None) -> TypeGuard[nn.Module]:
    """Whether a module stands for another one that it holds, as PEFT's adapters do."""
    return module is not None and isinstance(getattr(module, "base_layer", None), nn.Module)


def _parent_path(path: str, modules: dict[str, nn.Module]) -> str:
    parent = path.rpartition(".")[0]
    return _parent_path(parent, modules) if is_wrapped(modules[parent]) else parent


def _router(block: nn.Module) -> nn.Module | None:
    names = ("gate", "router")
    return _unwrapped(next((one for name, one in block.named_children() if name in names), None))


def _unwrapped(module: nn.Module | None) -> nn.Module | None:
    while is_wrapped(module):
        module = module.get_submodule("base_layer")
    return module


def _gate(router: nn.Module | None) -> tuple[nn.Module | None, int]:
    """The router's last linear map, if it is a module of its own, and the number of its rows."""
    if router is None:
        return None, 0
    linears = list(_linears(router))
    if linears:
        return linears[-1], linears[-1].out_features
    matrices = [p for p in router.parameters() if p.dim() == 2]
    return None, matrices[0].shape[0] if matrices else 0


def _linears(module: nn.Module) -> Iterator[Any]:
    """Linear maps, wrapped or quantized ones too, but nothing inside of them."""
    if isinstance(getattr(module, "out_features", None), int):
        yield module
        return
    for child in module.children():
        yield from _linears(child)


def _top_k(router: nn.Module | None, block: nn.Module, model: nn.Module) -> int:
    owners: list[Any] = [router, block, *_configs(model)]
    for owner in owners:
        found = _number(owner, _TOP_K_NAMES)
        if found:
            return found
    return 1


def _number(owner: Any, names: tuple[str, ...]) -> int:
    values = (getattr(owner, name, None) for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), 0)


def _configs(model: nn.Module) -> list[Any]:
    config = getattr(model, "config", None)
    inner = [getattr(config, name, None) for name in ("text_config", "ffn_config")]
    return [config, *inner]


def _expert_names(model: nn.Module) -> tuple[str, ...]:
    """Names that `expertmix convert` writes into a model's config."""
    return tuple(getattr(getattr(model, "config", None), "expert_names", None) or ())
