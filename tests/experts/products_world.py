"""Experts modules of every layout, and what to compare: outputs and gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.integrations.moe import use_experts_implementation

HIDDEN, WIDTH, EXPERTS = 16, 8, 5


class _Experts(nn.Module):
    """Weights by layout; eager, one pair after the other."""

    def __init__(self, config: PreTrainedConfig, *, gated: bool, transposed: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.num_experts, width = EXPERTS, WIDTH * (2 if gated else 1)
        shapes = (width, HIDDEN), (HIDDEN, WIDTH)
        first, self.down_proj = (
            nn.Parameter(torch.randn(EXPERTS, *(shape[::-1] if transposed else shape)))
            for shape in shapes
        )
        self.act_fn = nn.SiLU()
        if gated:
            self.gate_up_proj = first
        else:
            self.up_proj = first

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        self_: Any = self
        first = self_.gate_up_proj if self_.has_gate else self_.up_proj
        found = []
        for token in range(len(hidden)):
            given = torch.zeros_like(hidden[token])
            for expert, weight in zip(index[token].tolist(), weights[token], strict=True):
                if expert >= EXPERTS:
                    continue
                up, down = first[expert], self.down_proj[expert]
                if self_.is_transposed:
                    up, down = up.t(), down.t()
                inner = (up @ hidden[token])[None]
                act = self_._apply_gate(inner) if self_.has_gate else self.act_fn(inner)
                given = given + weight * (down @ act[0])
            found.append(given)
        return torch.stack(found) if found else torch.zeros_like(hidden)


@use_experts_implementation
class Gated(_Experts):
    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config, gated=True, transposed=False)


@use_experts_implementation(is_transposed=True)
class Transposed(_Experts):
    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config, gated=True, transposed=True)


@use_experts_implementation(has_gate=False)
class Ungated(_Experts):
    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config, gated=False, transposed=False)


@use_experts_implementation(is_concatenated=False)
class Interleaved(_Experts):
    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config, gated=True, transposed=False)

    def _apply_gate(self, inner: Tensor) -> Tensor:
        return inner[..., ::2].clamp(max=1.0).tanh() * (inner[..., 1::2] + 1)


LAYOUTS = (Gated, Transposed, Ungated, Interleaved)


def made(layout: type[nn.Module], dtype: torch.dtype = torch.float64) -> Any:
    config = PreTrainedConfig()
    config._experts_implementation = "eager"
    module: Any = layout(config)  # type: ignore[call-arg]
    return module.to(dtype)


@dataclass(frozen=True)
class Asked:
    """What experts are asked."""

    hidden: Tensor
    index: Tensor
    weights: Tensor


def asked(tokens: int, top_k: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Asked:
    make = torch.Generator().manual_seed(seed)
    scores = torch.randn(tokens, EXPERTS, generator=make, dtype=torch.float64)
    weights, index = scores.softmax(-1).topk(top_k, dim=-1)
    hidden = torch.randn(tokens, HIDDEN, generator=make, dtype=torch.float64)
    return Asked(hidden.to(dtype), index, weights.to(dtype))


def outcome(experts: Any, implementation: str, given: Asked) -> dict[str, Tensor]:
    """Output, and gradients for hidden states, weights and parameters."""
    experts.config._experts_implementation = implementation
    experts.zero_grad()
    hidden, weights = (one.clone().requires_grad_() for one in (given.hidden, given.weights))
    output = experts(hidden, given.index, weights)
    (
        output * torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view_as(output)
    ).sum().backward()
    named = {name: one.grad for name, one in experts.named_parameters()}
    found = {"output": output, "hidden": hidden.grad, "weights": weights.grad, **named}
    return {name: one.detach().clone() for name, one in found.items() if one is not None}
