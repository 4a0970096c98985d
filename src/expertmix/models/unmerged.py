"""The MoE before it exists: a dense model whose MLPs choose among LoRA experts.

One base MLP and low-rank updates stand for all experts, so nothing is merged and a forward costs
little more than the dense one. Used to fit routers and to measure them; numerically the same as
the upcycled MoE up to rounding. Knows Llama's MLP (gate, up, down, activation), nothing of files.

Shape legend: T tokens, E experts, H hidden size, I width of the MLP, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from expertmix.models.library import Adapter, Library

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

Decide = Callable[[int, Tensor], Tensor]
"""(layer, MLP input [T, H] in float32) -> router logits [T, E]."""


@dataclass(frozen=True)
class LowRank:
    """One expert's update of one projection; `scale` is folded into `up`."""

    down: Tensor
    up: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out]."""
        return (x @ self.down.T) @ self.up.T


Expert = dict[str, LowRank]


class RoutedMLP(nn.Module):
    """A dense MLP that plays top-k of many experts, each the dense MLP plus an update."""

    def __init__(
        self, mlp: Any, layer: int, experts: list[Expert], decide: Decide, top_k: int
    ) -> None:
        super().__init__()
        self.mlp, self.layer, self.experts = mlp, layer, experts
        self.decide, self.top_k = decide, top_k

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        x_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits_TE = self.decide(self.layer, x_TH.float())
        chosen = logits_TE.softmax(-1).topk(self.top_k, dim=-1)
        weights_TK = chosen.values / chosen.values.sum(-1, keepdim=True)
        mixed_TH = self._mix(x_TH, weights_TK, chosen.indices)
        return mixed_TH.view_as(hidden_states)

    def _mix(self, x_TH: Tensor, weights_TK: Tensor, index_TK: Tensor) -> Tensor:
        gate_TI, up_TI = self.mlp.gate_proj(x_TH), self.mlp.up_proj(x_TH)
        inner_TI, outer_TH = torch.zeros_like(gate_TI), torch.zeros_like(x_TH)
        for e, expert in enumerate(self.experts):
            token, rank = torch.where(index_TK == e)
            weight = weights_TK[token, rank, None].to(x_TH.dtype)
            inner = self._inner(expert, x_TH[token], gate_TI[token], up_TI[token]) * weight
            inner_TI.index_add_(0, token, inner)
            if "down_proj" in expert:
                outer_TH.index_add_(0, token, expert["down_proj"](inner))
        # The base's down projection is linear: one product serves all experts.
        summed_TH: Tensor = self.mlp.down_proj(inner_TI) + outer_TH
        return summed_TH

    def _inner(self, expert: Expert, x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
        if "gate_proj" in expert:
            gate = gate + expert["gate_proj"](x)
        if "up_proj" in expert:
            up = up + expert["up_proj"](x)
        activated: Tensor = self.mlp.act_fn(gate)
        return activated * up


@contextmanager
def routed(
    model: Any, library: Library, decide: Decide, *, top_k: int = 2, include_base: bool = True
) -> Iterator[None]:
    """Inside the block, `model` computes as the MoE of itself and the library.

    Args:
        model: a dense Llama-like causal LM of transformers; restored at the end of the block.
        library: adapters on its MLP projections.
        decide: the routers.
        top_k: experts per token.
        include_base: expert 0 is the unchanged MLP.
    """
    layers = model.model.layers
    original = [layer.mlp for layer in layers]
    dtype = model.dtype
    try:
        for i, mlp in enumerate(original):
            experts: list[Expert] = [{}] if include_base else []
            experts += [_expert(adapter, i, dtype) for adapter in library]
            layers[i].mlp = RoutedMLP(mlp, i, experts, decide, top_k)
        yield
    finally:
        for layer, mlp in zip(layers, original, strict=True):
            layer.mlp = mlp


def _expert(adapter: Adapter, layer: int, dtype: torch.dtype) -> Expert:
    expert: Expert = {}
    for projection in PROJECTIONS:
        module = f"model.layers.{layer}.mlp.{projection}"
        if module in adapter.updates:
            a, b = adapter.factors(module)
            expert[projection] = LowRank(a.to(dtype), (adapter.updates[module].scale * b).to(dtype))
    return expert
