from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.integrations import moe
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssForCausalLM

from expertmix.experts import products
from expertmix.experts.products import experts_forward, register_products

from .products_world import EXPERTS, LAYOUTS, Asked, Gated, asked, made, outcome

register_products()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", [1, 2, 40, 300])
def test_it_gives_what_eager_gives(layout: type[nn.Module], tokens: int) -> None:
    """Outputs and all gradients are those of the plain loop, in every layout."""
    experts = made(layout)
    question = asked(tokens, 3)
    mine, plain = (outcome(experts, name, question) for name in ("expertmix", "eager"))
    assert mine.keys() == plain.keys()
    for name, found in plain.items():
        assert_close(
            mine[name], found, rtol=1e-9, atol=1e-9, msg=lambda text, n=name: f"{n} {text}"
        )


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(0, 20),
    top_k=st.integers(1, EXPERTS),
    seed=st.integers(0, 1000),
    layout=st.sampled_from(LAYOUTS),
    size=st.integers(1, 50),
)
def test_any_shape(tokens: int, top_k: int, seed: int, layout: Any, size: int) -> None:
    """So for every number of tokens, none included, of experts per token, and of rows per chunk."""
    experts, question = made(layout), asked(tokens, top_k, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "_ROWS", size)
        mine = outcome(experts, "expertmix", question)
    if tokens:
        plain = outcome(experts, "eager", question)
        for name, found in plain.items():
            assert_close(mine[name], found, rtol=1e-9, atol=1e-9)
    else:
        assert mine["output"].shape == question.hidden.shape
        assert all(not one.any() for one in mine.values())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck(layout: type[nn.Module]) -> None:
    """Gradients are those of finite differences."""
    experts, question = made(layout), asked(5, 3)
    experts.config._experts_implementation = "expertmix"
    hidden, weights = (one.requires_grad_() for one in (question.hidden, question.weights))
    parameters = tuple(experts.parameters())

    def run(hidden: torch.Tensor, weights: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = experts(hidden, question.index, weights)
        return found

    assert torch.autograd.gradcheck(run, (hidden, weights, *parameters), fast_mode=True)


def test_pairs_of_another_process_are_left_out() -> None:
    """Numbers from E on give nothing, and their weights have no gradient."""
    experts, question = made(Gated), asked(9, 3)
    index = question.index.masked_fill(question.index > 2, EXPERTS)
    question = Asked(question.hidden, index, question.weights)
    mine, plain = (outcome(experts, name, question) for name in ("expertmix", "eager"))
    for name, found in plain.items():
        assert_close(mine[name], found, rtol=1e-9, atol=1e-9)


def test_weight_zero_costs_nothing() -> None:
    """Without gradients for weights, a pair of weight 0 is not computed: its expert may be NaN."""
    experts, question = made(Gated), asked(6, 3)
    weights = question.weights.masked_fill(question.index == 2, 0.0)
    weights[4] = 0.0
    with torch.no_grad():
        plain = experts(question.hidden, question.index, weights)
        experts.gate_up_proj[2] = float("nan")
        given = experts_forward(experts, question.hidden, question.index, weights)
    assert_close(given, plain, rtol=1e-9, atol=1e-9)
    assert not given[4].any()


def test_weight_zero_has_a_gradient() -> None:
    """A pair of weight 0 is computed where the gradient of weights is asked for."""
    experts, question = made(Gated), asked(6, 3)
    question.weights[:, 0] = 0.0
    mine, plain = (outcome(experts, name, question) for name in ("expertmix", "eager"))
    assert_close(mine["weights"], plain["weights"], rtol=1e-9, atol=1e-9)
    assert plain["weights"][:, 0].all()


@pytest.mark.parametrize("tokens", [1, 30, 500])
def test_bfloat16_is_summed_in_float32(tokens: int) -> None:
    """In bfloat16, no further from the truth than transformers' grouped_mm is, within a bit."""
    question, truth = asked(tokens, 4), outcome(made(Gated), "eager", asked(tokens, 4))["output"]
    few = asked(tokens, 4, dtype=torch.bfloat16)
    experts = made(Gated, torch.bfloat16)
    errors = {
        name: (outcome(experts, name, few)["output"].double() - truth).norm()
        for name in ("expertmix", "grouped_mm")
    }
    assert errors["expertmix"] <= 1.25 * errors["grouped_mm"]
    assert question.hidden.dtype == torch.float64


def test_weights_may_be_wider() -> None:
    """Float32 weights of bfloat16 hidden states are used as they are; the output is bfloat16."""
    few = asked(20, 4, dtype=torch.bfloat16)
    question = Asked(few.hidden, few.index, few.weights.float())
    found = outcome(made(Gated, torch.bfloat16), "expertmix", question)
    assert found["output"].dtype == torch.bfloat16
    assert found["weights"].dtype == torch.float32


@pytest.mark.parametrize("frozen", ["gate_up_proj", "down_proj"])
def test_frozen_weights_have_no_gradient(frozen: str) -> None:
    """What wants no gradient gets none, and others get theirs."""
    experts, question = made(Gated), asked(8, 2)
    experts.get_parameter(frozen).requires_grad_(False)
    mine, plain = (outcome(experts, name, question) for name in ("expertmix", "eager"))
    assert mine.keys() == plain.keys()
    assert frozen not in mine
    for name, found in plain.items():
        assert_close(mine[name], found, rtol=1e-9, atol=1e-9)


def test_same_bits_every_time() -> None:
    """On a CPU two runs are equal bit for bit."""
    experts, question = made(Gated, torch.float32), asked(50, 3, dtype=torch.float32)
    one, other = (outcome(experts, "expertmix", question) for _ in "12")
    assert all(torch.equal(one[name], other[name]) for name in one)


def _mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=40, hidden_size=16, intermediate_size=12, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=4,
    )  # fmt: skip
    return MixtralForCausalLM(config)


def test_every_moe_may_use_it() -> None:
    """`set_experts_implementation` takes it, and a model's logits stay."""
    model, ids = _mixtral(), torch.arange(12).view(2, 6)
    with torch.no_grad():
        model.set_experts_implementation("eager")
        plain = model(ids).logits
        model.set_experts_implementation("expertmix")
        assert_close(model(ids).logits, plain)


def test_other_layouts_fall_back() -> None:
    """Experts with biases run as grouped_mm, bit for bit."""
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=40, hidden_size=16, intermediate_size=12, num_hidden_layers=1, head_dim=8,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model, ids = GptOssForCausalLM(config), torch.arange(12).view(2, 6)
    with torch.no_grad():
        model.set_experts_implementation("grouped_mm")
        plain = model(ids).logits
        model.set_experts_implementation("expertmix")
        assert torch.equal(model(ids).logits, plain)


def test_tracing_falls_back() -> None:
    """Under torch.compile, grouped_mm is traced: no break in the graph that it has not itself."""
    experts, question = made(Gated, torch.float32), asked(8, 2, dtype=torch.float32)
    experts.config._experts_implementation = "expertmix"
    compiled = torch.compile(experts, backend="eager", fullgraph=True)
    with torch.no_grad():
        given = compiled(question.hidden, question.index, question.weights)
        assert_close(given, experts(question.hidden, question.index, question.weights))


def test_registered_when_asked() -> None:
    """Registering twice is once."""
    register_products()
    assert moe.ALL_EXPERTS_FUNCTIONS["expertmix"] is experts_forward
