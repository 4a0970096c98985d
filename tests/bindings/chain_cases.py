"""Small models that are chains of experts, and what their iterations got, seen without hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import expertmix as em
from expertmix.bindings.discovery import Block, find_blocks
from expertmix.experts.chain import Chain, Iteration
from expertmix.models.coe import CoeConfig, CoeForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "moe_intermediate_size": 24,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
CASES: tuple[dict[str, Any], ...] = (
    {"n_shared_experts": 1},
    {"gating": "shared", "scores": "sigmoid", "router_bias": True, "norm_topk_prob": True},
    {"gating": "fixed", "iteration_scale": True},
    {"gating": "shared", "active_iterations": 3},
)
IDS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(1))
ALL = {"logits": True}


def made(seed: int = 0, **changed: Any) -> CoeForCausalLM:
    """A tiny random one, in evaluation mode."""
    torch.manual_seed(seed)
    model = CoeForCausalLM(CoeConfig(**(SIZES | changed)))
    for name, tensor in model.named_buffers():
        if "correction" in name:
            tensor.copy_(torch.rand(tensor.shape) * 0.3)
    return model.eval()


def depth(model: CoeForCausalLM) -> int:
    return model.config.active_iterations or model.config.num_iterations


def sites_of(model) -> list[str]:
    return [str(info.site) for info in em.sites(model)]


@torch.no_grad()
def logits_of(model, *interventions, ids=IDS) -> Tensor:
    with em.record(model, *interventions):
        return model(ids).logits


@torch.no_grad()
def traced(model, *interventions, ids=IDS, options=None):
    with em.record(model, *interventions, **(options or {})) as trace:
        model(ids)
    return trace


@contextmanager
def _instead(model, change: Callable[[str, Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Let the experts' own forward get other weights: `change(site, indices, weights)`."""
    kinds = {type(block.experts): type(block.experts).forward for block in find_blocks(model)}
    names = {block.experts: block.info.site.name for block in find_blocks(model)}
    turns = dict.fromkeys(names.values(), 0)

    def changed(own):
        def forward(self, hidden_states, top_k_index, top_k_weights):
            site = f"{names[self]}#{turns[names[self]]}"
            turns[names[self]] += 1
            return own(self, hidden_states, top_k_index, change(site, top_k_index, top_k_weights))

        return forward

    for kind, own in kinds.items():
        kind.forward = changed(own)
    try:
        yield
    finally:
        for kind, own in kinds.items():
            kind.forward = own


@contextmanager
def spied(model) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """By site, what the experts' own forward got, call by call."""
    got: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(site, indices, weights):
        got[site] = indices.clone(), weights.clone()
        return weights

    with _instead(model, keep):
        yield got


@contextmanager
def factors(model) -> Iterator[dict[str, Tensor]]:
    """By site, ones that multiply the weights of that call, and want gradients."""
    used: dict[str, Tensor] = {}

    def multiply(site, indices, weights):
        used[site] = torch.ones_like(weights).requires_grad_()
        return weights * used[site]

    with _instead(model, multiply):
        yield used


@torch.no_grad()
def ran(model) -> list[tuple[Block, Tensor, Tensor | None]]:
    """Of every iteration that ran: its block, what its router read or would have, who had halted.

    Of a decision that is kept, what the router read in the first iteration.
    """
    calls: list[tuple[Chain, int, Tensor, Tensor | None]] = []
    own = Iteration.forward

    def forward(self, hidden, number, chain, before, halted):
        calls.append((chain, number, hidden if self.norm is None else self.norm(hidden), halted))
        return own(self, hidden, number, chain, before, halted)

    Iteration.forward = forward
    try:
        model(IDS)
    finally:
        Iteration.forward = own
    blocks = {(one.chain, one.info.site.step): one for one in find_blocks(model)}
    read = {(chain, number): hidden for chain, number, hidden, _ in calls}
    fixed = model.config.gating == "fixed"
    return [
        (blocks[chain, number], read[chain, 0 if fixed else number], halted)
        for chain, number, _, halted in calls
    ]
