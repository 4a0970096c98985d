"""An implementation of experts for every MoE of transformers: `expertmix`.

Pairs of a token and an expert are sorted once. Then some experts after others run from their rows
to their share of the output, so that what is between stays in the processor's cache, and their
weights are read where they lie. Pairs of weight 0 cost nothing where nobody asks for the gradient
of weights: a halted token, or an ablated expert.

    register_products()
    model.set_experts_implementation("expertmix")

Knows the experts modules of transformers; no model, no router. What it does not cover (other
devices than CPUs, tracing, biases, a norm after experts) goes to transformers' grouped_mm. There
is no second derivative.

Legend: T tokens, K experts per token, E experts, H hidden size, F width of experts (2F: gate and
up), P pairs, b pairs of one expert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from expertmix.experts.blocks import multiply
from expertmix.experts.deferred import Shelf, WeightGradient, finished, gradient_of, shared
from expertmix.experts.pairs import Chunk, Pairs

NAME = "expertmix"
_ROWS = 256  # of a chunk: what it works on stays in a cache of 2 MB
_PLAIN = (Tensor, nn.Parameter)
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def register_products() -> None:
    """Tell transformers of the implementation `expertmix`; as often as you like."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def experts_forward(
    experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """What the chosen experts give, weighted and added up.

    Args:
        experts: A module decorated with transformers' `use_experts_implementation`.
        hidden_states: (T, H).
        top_k_index: (T, K) expert numbers; from E on: of another process.
        top_k_weights: (T, K).

    Returns:
        (T, H).
    """
    if not _covered(experts, hidden_states):
        given: Tensor = grouped_mm_experts_forward(
            experts, hidden_states, top_k_index, top_k_weights
        )
        return given
    up, down = _weights(experts)
    learning = torch.is_grad_enabled()
    kept_TK = None if learning and top_k_weights.requires_grad else top_k_weights != 0
    pairs = Pairs.of(top_k_index, experts.num_experts, kept_TK)
    (up, up_shelf), (down, down_shelf) = (
        shared(one) if learning else (one, None) for one in (up, down)
    )
    gate = experts._apply_gate if experts.has_gate else experts.act_fn
    call = _Call(pairs, gate, experts.is_transposed, up_shelf, down_shelf)
    hidden_TH = hidden_states.to(up.dtype)
    if learning and any(one.requires_grad for one in (hidden_TH, top_k_weights, up, down)):
        apply: Any = _Experts.apply
        summed_TH: Tensor = apply(hidden_TH, top_k_weights, up, down, call)
    else:
        summed_TH = _run(hidden_TH, top_k_weights, up, down, call, None)
    return summed_TH.to(hidden_states.dtype)


def _weights(experts: Any) -> tuple[Tensor, Tensor]:
    return experts.gate_up_proj if experts.has_gate else experts.up_proj, experts.down_proj


def _covered(experts: Any, hidden_TH: Tensor) -> bool:
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return False
    if experts.has_bias or experts.has_post_expert_norm:
        return False
    return all(
        type(one) in _PLAIN and one.device.type == "cpu" and one.dtype in _DTYPES
        for one in (hidden_TH, *_weights(experts))
    )


@dataclass(frozen=True)
class _Call:
    """What a call knows beside its tensors.

    Attributes:
        pairs: Who calls whom.
        gate: (b, 2F) to (b, F), row by row; without a learned tensor.
        transposed: Whether weights are (E, in, out), not (E, out, in).
        up_shelf: Where the gradient of the first weight is, or None to return it.
        down_shelf: Of the second.
    """

    pairs: Pairs
    gate: Callable[[Tensor], Tensor]
    transposed: bool
    up_shelf: Shelf | None
    down_shelf: Shelf | None

    def product(
        self, rows_bI: Tensor, weight: Tensor, chunk: Chunk, out_bO: Tensor | None = None
    ) -> Tensor:
        """What the maps of a chunk's experts make of its rows, into `out_bO` where given."""
        maps = [weight[expert] for expert in chunk.experts]
        return _multiply(rows_bI, [m if self.transposed else m.t() for m in maps], chunk, out_bO)

    def back(self, rows_bO: Tensor, weight: Tensor, chunk: Chunk) -> Tensor:
        """The gradient of the rows of a product, of that of what it gave."""
        maps = [weight[expert] for expert in chunk.experts]
        return _multiply(rows_bO, [m.t() if self.transposed else m for m in maps], chunk, None)

    def add(self, to: WeightGradient, chunk: Chunk, given_bI: Tensor, back_bO: Tensor) -> None:
        """The gradient of the maps of a chunk, which were given the one and get back the other."""
        left, right = (given_bI, back_bO) if self.transposed else (back_bO, given_bI)
        blocks = zip(
            left.split_with_sizes(chunk.counts), right.split_with_sizes(chunk.counts), strict=True
        )
        for expert, (left_b, right_b) in zip(chunk.experts, blocks, strict=True):
            to.add(expert, left_b, right_b)


def _multiply(
    rows_bI: Tensor, maps_IO: list[Tensor], chunk: Chunk, out_bO: Tensor | None
) -> Tensor:
    if out_bO is None:
        out_bO = rows_bI.new_empty(len(rows_bI), maps_IO[0].shape[1])
    blocks = zip(
        rows_bI.split_with_sizes(chunk.counts), out_bO.split_with_sizes(chunk.counts), strict=True
    )
    for map_IO, (rows, out) in zip(maps_IO, blocks, strict=True):
        multiply(rows, map_IO, out)
    return out_bO


def _weighed(rows_bF: Tensor, weights_b1: Tensor) -> Tensor:
    """Rows times weights, rounded once."""
    return (rows_bF.to(weights_b1.dtype) * weights_b1).to(rows_bF.dtype)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _run(
    hidden_TH: Tensor,
    weights_TK: Tensor,
    up: Tensor,
    down: Tensor,
    call: _Call,
    inner_PF: Tensor | None,
) -> Tensor:
    """(T, H), summed up in float32 at least; and what maps `up` give, where a place is given."""
    weights_P1 = weights_TK.reshape(-1)[call.pairs.places, None]
    summed_TH = torch.zeros_like(hidden_TH, dtype=_wide(hidden_TH))
    for chunk in call.pairs.chunks(_ROWS):
        place = None if inner_PF is None else inner_PF[chunk.rows]
        inner_bF = call.product(hidden_TH.index_select(0, chunk.tokens), up, chunk, place)
        # g · W a = W (g · a), and F is smaller than H
        weighed_bF = _weighed(call.gate(inner_bF), weights_P1[chunk.rows])
        given_bH = call.product(weighed_bF, down, chunk)
        summed_TH.index_add_(0, chunk.tokens, given_bH.to(summed_TH.dtype))
    return summed_TH.to(hidden_TH.dtype)


class _Experts(torch.autograd.Function):
    """`_run` with gradients for hidden states, weights, and both maps."""

    @staticmethod
    def forward(
        ctx: Any, hidden_TH: Tensor, weights_TK: Tensor, up: Tensor, down: Tensor, call: _Call
    ) -> Tensor:
        inner_PF = hidden_TH.new_empty(
            len(call.pairs.tokens), up.shape[2 if call.transposed else 1]
        )
        ctx.call = call
        summed_TH = _run(hidden_TH, weights_TK, up, down, call, inner_PF)
        ctx.save_for_backward(hidden_TH, weights_TK, up, down, inner_PF)
        return summed_TH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, back_TH: Tensor) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        hidden_TH, weights_TK, up, down, inner_PF = ctx.saved_tensors
        wants_hidden, wants_weights, wants_up, wants_down, _ = ctx.needs_input_grad
        up_gradient = gradient_of(up, call.up_shelf) if wants_up else None
        down_gradient = gradient_of(down, call.down_shelf) if wants_down else None
        weights_P1 = weights_TK.reshape(-1)[call.pairs.places, None]
        moved_TK = torch.zeros_like(weights_TK, memory_format=torch.contiguous_format)
        moved_TH = torch.zeros_like(hidden_TH, dtype=_wide(hidden_TH))
        for chunk in call.pairs.chunks(_ROWS):
            rows, weights_b1 = chunk.rows, weights_P1[chunk.rows]
            back_bH = back_TH.index_select(0, chunk.tokens)
            back_bF = call.back(back_bH, down, chunk)
            act_bF, inner_back_bF = _gate_back(call.gate, inner_PF[rows], back_bF, weights_b1)
            moved_b = (back_bF * act_bF).sum(-1, dtype=_wide(weights_TK)).to(moved_TK.dtype)
            moved_TK.view(-1)[call.pairs.places[rows]] = moved_b
            if down_gradient is not None:
                weighed_bF = _weighed(act_bF, weights_b1)
                call.add(down_gradient, chunk, weighed_bF, back_bH)
            if up_gradient is not None:
                given_bH = hidden_TH.index_select(0, chunk.tokens)
                call.add(up_gradient, chunk, given_bH, inner_back_bF)
            if wants_hidden:
                moved_bH = call.back(inner_back_bF, up, chunk)
                moved_TH.index_add_(0, chunk.tokens, moved_bH.to(moved_TH.dtype))
        return (
            moved_TH.to(hidden_TH.dtype) if wants_hidden else None,
            moved_TK if wants_weights else None,
            finished(up_gradient, call.up_shelf),
            finished(down_gradient, call.down_shelf),
            None,
        )


def _gate_back(
    gate: Callable[[Tensor], Tensor], inner_bF: Tensor, back_bF: Tensor, weights_b1: Tensor
) -> tuple[Tensor, Tensor]:
    """What a gate gives, and the gradient of what it was given."""
    with torch.enable_grad():
        leaf_bF = inner_bF.detach().requires_grad_()
        act_bF = gate(leaf_bF)
    (moved_bF,) = torch.autograd.grad(act_bF, leaf_bF, _weighed(back_bF, weights_b1))
    return act_bF.detach(), moved_bF
