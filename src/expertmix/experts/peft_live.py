"""LoRA adapters read from a live PeftModel, at the scales that are set there.

The tensors are PEFT's own, not copies. Knows PEFT's layers; changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from expertmix.errors import CheckpointError
from expertmix.experts.lora import Adapter, Factors
from expertmix.experts.plain import refuse_unless_plain


def read_live(model: nn.Module) -> tuple[Adapter, ...]:
    """All adapters of a PeftModel, in the order in which they were added.

    Raises:
        CheckpointError: No PeftModel, adapters that are merged, or one that is not exactly
            `W + scale * B @ A` on linear modules.
    """
    configs = _configs(model)
    for name, config in configs.items():
        refuse_unless_plain(config.to_dict(), name)
    factors: dict[str, dict[str, Factors]] = {name: {} for name in configs}
    for path, layer in _lora_layers(model):
        module = path.removeprefix("base_model.model.")
        for name in configs:
            found = _factors(layer, module, name)
            if found is not None:
                factors[name][module] = found
    return tuple(
        Adapter(name, factors[name], str(config.base_model_name_or_path or ""))
        for name, config in configs.items()
    )


def _configs(model: nn.Module) -> dict[str, Any]:
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        raise CheckpointError(
            f"{type(model).__name__} is no PeftModel; give a folder of adapters, or a PeftModel "
            f"with adapters loaded"
        )
    return dict(model.peft_config)


def _lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            if module.merged:
                raise CheckpointError(
                    f"adapter {module.merged_adapters[0]!r} is merged into module {path!r}: merged "
                    f"adapters cannot be routed. Call model.unmerge_adapter() first."
                )
            yield path, module


def _factors(layer: Any, module: str, name: str) -> Factors | None:
    if name in layer.lora_embedding_A:
        raise CheckpointError(
            f"adapter {name!r}, module {module!r}: adapts an embedding, not a linear module"
        )
    if name not in layer.lora_A:
        return None
    down, up = layer.lora_A[name], layer.lora_B[name]
    if name in layer.lora_variant or not (type(down) is type(up) is nn.Linear):
        kind = type(layer.lora_variant.get(name, down)).__name__
        raise CheckpointError(f"adapter {name!r}, module {module!r}: not a plain LoRA ({kind})")
    return Factors(down.weight.detach(), up.weight.detach(), float(layer.scaling[name]))
