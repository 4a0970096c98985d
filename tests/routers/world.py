"""Directions of random and of planted adapters, without any model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from expertmix.experts.lora import Adapter, Factors
from expertmix.experts.shelf import Shelf
from expertmix.experts.stack import Projections, Reading, SharedStack, Stack
from expertmix.routers.directions import Directions
from expertmix.routers.seen import Seen

MODULE = "mlp.up_proj"
D = 32


def stack_of(
    adapters: Sequence[Adapter],
    dtype: torch.dtype = torch.float64,
    projections: Projections = "exact",
) -> Stack:
    """The stack of one module, on the CPU."""
    shared = SharedStack.build(
        Shelf.of(adapters),
        [MODULE],
        device=torch.device("cpu"),
        dtype=dtype,
        reading=Reading(projections=projections),
    )
    return shared.modules[MODULE]


def directions_of(adapters: Sequence[Adapter], dtype: torch.dtype = torch.float64) -> Directions:
    return stack_of(adapters, dtype).directions


def seen_of(adapters: Sequence[Adapter], hidden: Tensor, *, rows: int = 1) -> Seen:
    return Seen(hidden, directions_of(adapters, hidden.dtype), module=MODULE, rows=rows)


def sieved_of(adapters: Sequence[Adapter], hidden: Tensor) -> Seen:
    """Seen roughly first."""
    stack = stack_of(adapters, hidden.dtype, "sieved")
    assert stack.rough is not None
    rough = Seen(hidden, stack.rough, module=MODULE)
    return Seen(hidden, stack.directions, module=MODULE, rough=rough)


def hidden_states(tokens: int = 11, seed: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, D, generator=generator, dtype=torch.float64).to(dtype)


def planted(count: int, rank: int, *, sizes: Sequence[float] | None = None) -> list[Adapter]:
    """Adapters that read orthogonal subspaces of the input, and their sizes."""
    torch.manual_seed(7)
    basis, _ = torch.linalg.qr(torch.randn(D, count * rank, dtype=torch.float64))
    blocks = basis.T.reshape(count, rank, D)
    return [
        Adapter(
            f"planted{expert}",
            {
                MODULE: Factors(
                    torch.randn(rank, rank, dtype=torch.float64) @ block,
                    torch.randn(48, rank, dtype=torch.float64),
                    1.0 if sizes is None else sizes[expert],
                )
            },
        )
        for expert, block in enumerate(blocks)
    ]
