"""Which base and which adapters: a hash that tells compositions apart.

The router is left out on purpose: a trace of the oracle, say, may be replayed under any router. A
base in PEFT's wrappers counts as the base itself.
"""

from __future__ import annotations

from torch import nn

from expertmix.core.fingerprint import fingerprint as hashed
from expertmix.experts.shelf import Shelf


def fingerprint(model: nn.Module, shelf: Shelf, combine: str) -> str:
    """Hex SHA-256 of the base's structure and a sample of its weights, and of all adapters."""
    state = (
        (name.replace(".base_layer.", "."), tensor)
        for name, tensor in model.state_dict().items()
        if ".lora_" not in name
    )
    adapters = (f"{adapter.name} {adapter.digest}" for adapter in shelf)
    return hashed(state, combine, *adapters)
