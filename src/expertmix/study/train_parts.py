"""Parts of a model that can be trained alone: routers, scales, experts, adapters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from expertmix.bindings.discovery import find_blocks
from expertmix.errors import ConfigError
from expertmix.experts.chain import Iteration
from expertmix.experts.chain_router import ChainRouter
from expertmix.study.train_settings import Lora, What


def select(model: Any, what: What, lora: Lora) -> Any:
    """Let only one part learn; with `lora`, the model that has adapters on it.

    Args:
        model: A causal LM, changed in place.
        what: The part.
        lora: Of the adapters.

    Raises:
        NoSitesError: A part of a MoE is asked of a dense model.
        ConfigError: The model has no such part, or no module that adapters are meant for.
    """
    if what == "lora":
        return _adapted(model, lora)
    if what == "all":
        model.requires_grad_(True)
        return model
    chosen = _parameters(model, what)
    if not chosen:
        raise ConfigError(f"what={what}: {type(model).__name__} has none")
    model.requires_grad_(False)
    for parameter in chosen:
        parameter.requires_grad_(True)
    return model


def routers(model: nn.Module) -> list[nn.Module]:
    """All routers of a model, in order."""
    known = [block.router for block in find_blocks(model) if block.router is not None]
    return known or [one for one in model.modules() if isinstance(one, ChainRouter)]


def _parameters(model: nn.Module, what: What) -> list[nn.Parameter]:
    if what == "experts":
        return _all(block.experts for block in find_blocks(model))
    scales = [
        one.scale for one in model.modules() if isinstance(one, Iteration) and one.scale is not None
    ]
    if what == "routers":
        return _all(routers(model))
    if not scales:
        raise ConfigError(
            f"what={what}: {type(model).__name__} has no scales of iterations: use what: routers, "
            f"or convert it to a chain of experts"
        )
    return [*_all(routers(model)), *scales]


def _all(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    return [parameter for module in modules for parameter in module.parameters()]


def _adapted(model: Any, lora: Lora) -> Any:
    from peft import LoraConfig, get_peft_model

    targets = "all-linear" if lora.targets == ("all-linear",) else list(lora.targets)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, config)
    except ValueError as problem:
        reason = str(problem).partition("\n")[0]
        raise ConfigError(f"lora.targets={list(lora.targets)}: {reason}") from problem
