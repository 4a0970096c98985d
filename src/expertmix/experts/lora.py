"""A LoRA adapter in memory: for each module it adapts, `W + scale * B @ A`.

Knows no file format, no model and no peft.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from expertmix.errors import CheckpointError


@dataclass(frozen=True, eq=False)
class Factors:
    """What an adapter adds to one module's weight: `scale * up @ down`.

    Attributes:
        down: A, (rank, in_features).
        up: B, (out_features, rank).
        scale: alpha / rank, or alpha / sqrt(rank) for rsLoRA.
    """

    down: Tensor
    up: Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features) of the weight that it fits."""
        return self.up.shape[0], self.down.shape[1]


@dataclass(frozen=True, eq=False)
class Adapter:
    """One adapter.

    Attributes:
        name: Unique on its shelf.
        factors: Per module name (`model.layers.0.mlp.up_proj`) what it adds there.
        base: The base model as its config names it; may be empty.

    Raises:
        CheckpointError: No module, factors that do not fit each other, or factors or scales that
            are NaN or infinite.
    """

    name: str
    factors: Mapping[str, Factors]
    base: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "factors", dict(self.factors))
        if not self.factors:
            raise CheckpointError(f"adapter {self.name!r} adapts no module")
        for module, factors in self.factors.items():
            _check(self.name, module, factors)

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 of what it does: modules, scales and every byte of the factors."""
        digest = hashlib.sha256()
        for module in sorted(self.factors):
            factors = self.factors[module]
            digest.update(f"{module} {factors.scale!r}".encode())
            for value in (factors.down, factors.up):
                digest.update(f" {value.dtype} {tuple(value.shape)}".encode())
                digest.update(_bytes(value))
        return digest.hexdigest()


def _bytes(value: Tensor) -> Any:
    flat = value.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy()


def _finite(value: Tensor) -> bool:
    """No NaN and no infinity; several times faster than asking every value."""
    wide = value if value.dtype.itemsize > 1 else value.float()
    return not value.numel() or bool(torch.isfinite(torch.stack(wide.aminmax())).all())


def _check(name: str, module: str, factors: Factors) -> None:
    down, up = factors.down, factors.up
    if down.dim() != 2 or up.dim() != 2 or down.shape[0] != up.shape[1]:
        raise CheckpointError(
            f"adapter {name!r}, module {module!r}: factors do not fit: A {tuple(down.shape)}, "
            f"B {tuple(up.shape)}; A must be (rank, in) and B (out, rank)"
        )
    if not (down.is_floating_point() and up.is_floating_point()):
        raise CheckpointError(
            f"adapter {name!r}, module {module!r}: factors of {down.dtype} and {up.dtype}; they "
            f"must be floating, not quantized"
        )
    if not abs(factors.scale) <= torch.finfo(torch.float32).max:
        raise CheckpointError(
            f"adapter {name!r}, module {module!r}: its scale is {factors.scale}, not a finite "
            f"float32; see alpha in its config"
        )
    if not (_finite(down) and _finite(up)):
        raise CheckpointError(
            f"adapter {name!r}, module {module!r}: weights are NaN or infinite; train it again or "
            f"leave it out"
        )
