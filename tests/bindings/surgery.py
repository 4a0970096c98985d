"""Brute force for interventions: change the model itself, then compare with the edited run.

A model without expert e is the honest meaning of `Mask`; a model whose expert e outputs zero is the
honest meaning of `Ablate`. Both are made here by cutting parameters, without any expertmix code but
discovery.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from expertmix.bindings.discovery import Block


def silence(block: Block, expert: int) -> None:
    """Make an expert output zero by zeroing all of its parameters."""
    experts = block.experts
    count = block.info.num_experts
    if isinstance(
        getattr(experts, "mlp", None), nn.Module
    ):  # dbrx keeps its experts one level down
        for parameter in experts.mlp.parameters():
            parameter.data.view(count, -1)[expert] = 0
        return
    for parameter in experts.parameters():
        if parameter.shape[0] == count:
            parameter.data[expert] = 0


def remove(block: Block, expert: int) -> None:
    """Cut an expert out of a block: its parameters, gate row, bias and place in counts."""
    count = block.info.num_experts
    keep = torch.tensor([e for e in range(count) if e != expert])
    flat = isinstance(getattr(block.experts, "mlp", None), nn.Module)
    for module in _parts(block):
        for name, parameter in list(module.named_parameters(recurse=False)):
            rows = _cut(parameter.data, keep, count, flat)
            module.register_parameter(name, nn.Parameter(rows, requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, _cut(buffer, keep, count, flat))
        for name, value in vars(module).items():
            if type(value) is int and value == count:
                setattr(module, name, count - 1)


def _parts(block: Block) -> Iterator[nn.Module]:
    yield block.module
    assert block.router is not None
    yield from block.router.modules()
    yield from block.experts.modules()


def _cut(values: torch.Tensor, keep: torch.Tensor, count: int, flat: bool) -> torch.Tensor:
    if flat and values.shape[0] % count == 0 and values.shape[0] > count:
        return values.view(count, -1, *values.shape[1:])[keep].flatten(0, 1).clone()
    for dim, size in enumerate(values.shape):
        if size == count:
            return values.index_select(dim, keep).clone()
    return values.clone()
