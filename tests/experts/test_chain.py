"""The layer, against a loop over tokens and its laws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from expertmix.errors import ConfigError
from expertmix.experts.chain import Chain
from expertmix.experts.chain_router import ChainRouter
from expertmix.experts.chain_settings import GATINGS, NORMS, RESIDUALS, SCORES, SHARED_EXPERTS
from expertmix.models.coe import CoeConfig
from expertmix.models.coe.modeling_coe import CoeDecoderLayer

HIDDEN, EXPERTS = 8, 6


def made(seed: int = 0, *, double: bool = True, **changed: Any) -> Chain:
    """A chain with random weights, whose experts multiply one after the other."""
    sizes: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "num_attention_heads": 1,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 5,
        "num_hidden_layers": 1,
    }
    config = CoeConfig(**(sizes | changed))
    config._experts_implementation = "eager"
    chain = CoeDecoderLayer(config, 0).mlp
    assert isinstance(chain, Chain)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in chain.state_dict().items():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.6)
            if "norm" in name:
                tensor.add_(1)
    return (chain.double() if double else chain).eval()


def tokens(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed)).double()


@torch.no_grad()
def brute(chain: Chain, stream: Tensor) -> Tensor:
    return torch.stack([_one(chain, token_H) for token_H in stream])


def _normalized(norm: Any, x_H: Tensor) -> Tensor:
    # as in all of transformers, the norm computes in float32
    single_H = x_H.float()
    scaled_H = single_H * torch.rsqrt(single_H.pow(2).mean() + norm.variance_epsilon)
    weighted: Tensor = norm.weight * scaled_H.to(x_H.dtype)
    return weighted


def _one(chain: Chain, x_H: Tensor) -> Tensor:
    config = chain.config
    if config.norm == "once":
        x_H = _normalized(chain.norm, x_H)
    start_H, kept = x_H, None
    for number in range(config.num_iterations):
        part = chain.iterations[number]
        read_H = x_H if config.norm == "once" else _normalized(part.norm, x_H)
        if kept is None or config.gating != "fixed":
            gate = chain.iterations[number if config.gating == "independent" else 0].gate
            kept = _chosen(gate, read_H)
        given_H = torch.zeros_like(x_H)
        for expert, weight in kept:
            given_H = given_H + weight * _expert(chain.experts, expert, read_H)
        if chain.shared_experts is not None and (
            config.shared_experts == "per_iteration" or number == 0
        ):
            shared_H = chain.shared_experts(read_H)
            if config.shared_expert_gate:
                shared_H = shared_H * (chain.shared_expert_gate.weight[0] @ read_H).sigmoid()
            given_H = given_H + shared_H
        if config.iteration_scale and number:
            given_H = given_H * part.scale
        if config.residual in ("inner", "inner+outer"):
            x_H = x_H + given_H
        else:
            x_H = given_H + start_H if config.residual == "init" else given_H
    return x_H + start_H if config.residual in ("outer", "inner+outer") else x_H


def _expert(experts: Any, number: int, x_H: Tensor) -> Tensor:
    gate_up, down = experts.gate_up_proj[number], experts.down_proj[number]
    gate, up = (gate_up @ x_H).chunk(2)
    given_H: Tensor = down @ (nn.functional.silu(gate) * up)
    return given_H


def _chosen(gate: Any, x_H: Tensor) -> list[tuple[int, Tensor]]:
    config = gate.config
    logits = [gate.weight[expert] @ x_H for expert in range(EXPERTS)]
    total = torch.stack([one.exp() for one in logits]).sum()
    softmax = config.scores == "softmax"
    scores = [one.exp() / total if softmax else 1 / (1 + (-one).exp()) for one in logits]
    bias = gate.e_score_correction_bias.tolist() if config.router_bias else [0.0] * EXPERTS
    ranked = [float(score) + moved for score, moved in zip(scores, bias, strict=True)]
    open_to = set(range(EXPERTS))
    if config.n_group is not None:
        size = EXPERTS // config.n_group
        groups = [range(first, first + size) for first in range(0, EXPERTS, size)]
        led_by = 1 if softmax else 2
        best = [sum(sorted((ranked[e] for e in g), reverse=True)[:led_by]) for g in groups]
        leading = sorted(range(len(groups)), key=lambda g: -best[g])[: config.topk_group]
        open_to = {expert for group in leading for expert in groups[group]}
    chosen = sorted(open_to, key=lambda expert: -ranked[expert])[: config.num_experts_per_tok]
    divisor = sum(scores[expert] for expert in chosen) if config.norm_topk_prob else 1.0
    return [(e, scores[e] / divisor * config.routed_scaling_factor) for e in chosen]


def _settings() -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {
            "num_iterations": st.integers(1, 3),
            "gating": st.sampled_from(GATINGS),
            "residual": st.sampled_from(RESIDUALS),
            "norm": st.sampled_from(NORMS),
            "shared_experts": st.sampled_from(SHARED_EXPERTS),
            "n_shared_experts": st.integers(0, 2),
            "shared_expert_gate": st.booleans(),
            "scores": st.sampled_from(SCORES),
            "norm_topk_prob": st.booleans(),
            "router_bias": st.booleans(),
            "iteration_scale": st.booleans(),
            "routed_scaling_factor": st.sampled_from([1.0, 2.5]),
            "groups": st.sampled_from([(None, None), (3, 2), (2, 1)]),
        }
    )


@settings(max_examples=150)
@given(asked=_settings(), seed=st.integers(0, 10_000), count=st.integers(1, 5))
def test_it_is_the_loop(asked: dict[str, Any], seed: int, count: int) -> None:
    """A chain gives, in float64, what a loop over tokens, iterations and experts gives."""
    n_group, topk_group = asked["groups"]
    changed = {key: value for key, value in asked.items() if key != "groups"}
    chain = made(seed, n_group=n_group, topk_group=topk_group, **changed)
    stream = tokens(count, seed)
    assert_close(chain(stream), brute(chain, stream), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_the_router_is_deepseeks(seed: int) -> None:
    """Sigmoids, a bias that only selects, groups, renormalized and scaled: DeepSeek-V3's router."""
    config: Any = CoeConfig(
        hidden_size=HIDDEN, num_experts=8, num_experts_per_tok=3, n_group=4, topk_group=2,
        scores="sigmoid", router_bias=True, norm_topk_prob=True, routed_scaling_factor=2.5,
    )  # fmt: skip
    ours, theirs = ChainRouter(config), DeepseekV3TopkRouter(config)
    draw = torch.Generator().manual_seed(seed)
    weights = {
        "weight": torch.randn(8, HIDDEN, generator=draw),
        "e_score_correction_bias": 0.3 * torch.randn(8, generator=draw),
    }
    found = []
    for router in (ours, theirs):
        router.load_state_dict(weights)
        _, weights_TK, index_TK = router(tokens(50, seed).float())
        found.append(torch.zeros(50, 8).scatter(1, index_TK, weights_TK))
    assert torch.equal(*found)


@pytest.mark.parametrize("gating", GATINGS)
def test_experts_have_no_order(gating: str) -> None:
    """Permuting experts together with the rows of all routers changes nothing."""
    chain, other = made(gating=gating, router_bias=True), made(gating=gating, router_bias=True)
    order = torch.randperm(EXPERTS, generator=torch.Generator().manual_seed(3))
    moved = ("gate.weight", "bias", "gate_up_proj", "down_proj")
    with torch.no_grad():
        for name, tensor in other.state_dict().items():
            if name.endswith(moved):
                tensor.copy_(tensor[order].clone())
    assert_close(other(tokens(9)), chain(tokens(9)), rtol=1e-12, atol=1e-12)


def test_experts_that_give_nothing_change_nothing() -> None:
    """With zero experts, the inner residual is the identity, bit for bit."""
    chain = made(num_iterations=3)
    nn.init.zeros_(chain.experts.down_proj)
    assert torch.equal(chain(tokens(5)), tokens(5))


def test_iterations_have_an_order() -> None:
    """Swapping two iterations changes what comes out."""
    chain = made()
    before = chain(tokens(5))
    chain.iterations = nn.ModuleList(reversed(list(chain.iterations)))
    assert not torch.allclose(chain(tokens(5)), before)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_arrive(checkpointed: bool) -> None:
    """Every router, norm and scale has a gradient; checkpointing leaves all of them as they are."""
    grads = []
    for again in (False, checkpointed):
        chain = made(num_iterations=3, iteration_scale=True, checkpoint_iterations=again).train()
        chain(tokens(20)).square().sum().backward()
        grads.append({name: one.grad for name, one in chain.named_parameters()})
    for name, found in grads[1].items():
        assert found is not None, name
        assert bool(found.any()), name
        assert_close(found, grads[0][name], rtol=1e-12, atol=1e-12)


def test_scale_zero_is_an_iteration_less() -> None:
    """An iteration at scale 0 gives what one iteration less gives, bit for bit."""
    chain = made(num_iterations=3, iteration_scale=True)
    nn.init.zeros_(chain.iterations[2].scale)
    whole = chain(tokens(5))
    chain.config.active_iterations = 2
    assert torch.equal(chain(tokens(5)), whole)


def test_beyond_the_last_iteration_the_last_is_repeated() -> None:
    """C' = 4 of C = 2 equals four iterations of which the last three are alike."""
    chain = made(active_iterations=4)
    longer = made(num_iterations=4)
    longer.load_state_dict(
        {
            name: chain.state_dict()[name.replace("ns.2.", "ns.1.").replace("ns.3.", "ns.1.")]
            for name in longer.state_dict()
        }
    )
    assert torch.equal(chain(tokens(5)), longer(tokens(5)))


@pytest.mark.parametrize("residual", RESIDUALS)
def test_halting_at_nothing_and_at_all(residual: str) -> None:
    """Threshold 0 halts no token; a huge one leaves one iteration."""
    chain = made(num_iterations=3, residual=residual)
    plain = chain(tokens(5))
    chain.config.halting_threshold = 0.0
    assert torch.equal(chain(tokens(5)), plain)
    chain.config.halting_threshold = 1e9
    halted = chain(tokens(5))
    chain.config.halting_threshold, chain.config.active_iterations = None, 1
    assert_close(halted, chain(tokens(5)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shared", [0, 1])
@torch.no_grad()
def test_a_token_halts_by_itself(shared: int) -> None:
    """A token's result is one of its own iterations, whoever runs beside it."""
    chain = made(num_iterations=3, n_shared_experts=shared)
    sizes = []
    for depth in (1, 2, 3):
        chain.config.active_iterations = depth
        sizes.append(chain(tokens(12)))
    chain.config.active_iterations = None
    first = (sizes[0] - tokens(12)).norm(dim=-1) / tokens(12).norm(dim=-1)
    chain.config.halting_threshold = float(first.median()) + 1e-6
    together = chain(tokens(12))
    alone = torch.cat([chain(tokens(12)[at : at + 1]) for at in range(12)])
    assert_close(together, alone, rtol=1e-12, atol=1e-12)
    stopped = first < chain.config.halting_threshold
    assert 0 < int(stopped.sum()) < 12
    assert_close(together[stopped], sizes[0][stopped], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_experts_per_tok", 7),
        ("num_iterations", 0),
        ("active_iterations", 0),
        ("gating", "odd"),
        ("residual", "odd"),
        ("norm", "odd"),
        ("shared_experts", "odd"),
        ("scores", "odd"),
        ("attention", "odd"),
        ("n_group", 2),
        ("halting_threshold", -0.1),
    ],
)
def test_what_cannot_be_is_refused(key: str, value: Any) -> None:
    """A setting of which no chain can be made is an error that names the key."""
    with pytest.raises(ConfigError, match=key):
        made(**{key: value})
