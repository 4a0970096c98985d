from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from expertmix.experts import deferred, products
from expertmix.experts.chain_settings import GATINGS, RESIDUALS
from expertmix.experts.deferred import WeightGradient, one_gradient
from expertmix.experts.products import register_products
from expertmix.models.coe import CoeConfig, CoeForCausalLM

register_products()
Gradients = dict[str, Tensor]


@pytest.fixture
def finished(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[WeightGradient]]:
    """Every weight gradient that is finished."""
    found: list[WeightGradient] = []
    finish = WeightGradient.finish

    def spy(self: WeightGradient) -> Tensor:
        found.append(self)
        return finish(self)

    monkeypatch.setattr(WeightGradient, "finish", spy)
    return found


def model(**changes: Any) -> Any:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": 30, "hidden_size": 16, "moe_intermediate_size": 8, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_experts": 5, "num_experts_per_tok": 2, "num_iterations": 3,
        "initializer_range": 0.3,
    }  # fmt: skip
    made = CoeForCausalLM(CoeConfig(**{**settings, **changes})).double()
    made.set_experts_implementation("expertmix")
    return made.train()


IDS = torch.arange(24).view(2, 12) % 30


def gradients(coe: Any, implementation: str = "expertmix", ids: Tensor = IDS) -> Gradients:
    coe.set_experts_implementation(implementation)
    coe.zero_grad()
    coe(ids, labels=ids).loss.backward()
    return kept(coe)


def kept(coe: Any) -> Gradients:
    return {name: one.grad.clone() for name, one in coe.named_parameters() if one.grad is not None}


def same(mine: Gradients, plain: Gradients) -> None:
    assert mine.keys() == plain.keys()
    for name, found in plain.items():
        assert_close(mine[name], found, rtol=1e-9, atol=1e-12, msg=lambda t, n=name: f"{n} {t}")


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("gating", GATINGS)
def test_gradients_are_those_of_eager(
    residual: str, gating: str, finished: list[WeightGradient]
) -> None:
    """For each residual and gating; and each of 2 layers × 2 weights has one gradient made."""
    coe = model(residual=residual, gating=gating)
    plain = gradients(coe, "eager")
    assert not finished
    same(gradients(coe), plain)
    assert len(finished) == 4


@pytest.mark.parametrize("tokens", [1, 400])
def test_few_rows_wait_and_many_are_added_at_once(tokens: int) -> None:
    """With any number of rows per expert."""
    coe, ids = model(), torch.arange(tokens)[None] % 30
    same(gradients(coe, ids=ids), gradients(coe, "eager", ids=ids))


@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_computed_again(reentrant: bool, finished: list[WeightGradient]) -> None:
    """Gradient checkpointing by layer changes nothing, and one gradient is made per weight."""
    coe = model()
    plain = gradients(coe, "eager")
    coe.activation_checkpointing_enable({"use_reentrant": reentrant})
    coe.get_input_embeddings().weight.requires_grad_()
    coe.enable_input_require_grads()
    same(gradients(coe), plain)
    assert len(finished) == 4


def test_iterations_computed_again(finished: list[WeightGradient]) -> None:
    """Checkpoints by iteration change nothing; each iteration then makes its own gradient."""
    coe = model(checkpoint_iterations=True)
    plain = gradients(coe, "eager")
    same(gradients(coe), plain)
    assert len(finished) == 3 * 4


def test_frozen_experts() -> None:
    """Experts that want no gradient get none; routers get theirs."""
    coe = model()
    for name, one in coe.named_parameters():
        one.requires_grad_("experts" not in name)
    mine = gradients(coe)
    same(mine, gradients(coe, "eager"))
    assert any("gate" in name for name in mine)


def test_experts_alone() -> None:
    """Nor does it matter that nothing but experts wants one."""
    coe = model()
    for name, one in coe.named_parameters():
        one.requires_grad_("experts.down_proj" in name)
    same(gradients(coe), gradients(coe, "eager"))


def test_gradients_add_up() -> None:
    """Two backwards without zeroing give the sum."""
    coe = model()
    first, second = IDS, IDS.flip(0, 1)
    one, other = gradients(coe, ids=first), gradients(coe, ids=second)
    coe.zero_grad()
    for ids in (first, second):
        coe(ids, labels=ids).loss.backward()
    same(kept(coe), {name: one[name] + other[name] for name in one})


def test_a_graph_may_be_used_again() -> None:
    """A kept graph gives the same a second time, whatever was asked of it in between."""
    coe = model()
    plain = gradients(coe, "eager")
    coe.set_experts_implementation("expertmix")
    coe.zero_grad()
    loss = coe(IDS, labels=IDS).loss
    router = coe.model.layers[0].mlp.iterations[1].gate.weight
    weight = coe.model.layers[0].mlp.experts.down_proj
    for _ in "12":
        (found,) = torch.autograd.grad(loss, router, retain_graph=True)
        assert_close(found, plain["model.layers.0.mlp.iterations.1.gate.weight"])
        (found,) = torch.autograd.grad(loss, weight, retain_graph=True)
        assert_close(found, plain["model.layers.0.mlp.experts.down_proj"])
    for _ in "12":
        coe.zero_grad()
        loss.backward(retain_graph=True)
        same(kept(coe), plain)


def test_iterations_that_do_not_see_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where an iteration's input is cut off from those before, nothing is lost either."""
    coe = model(residual="none")
    cut = type(coe.model.layers[0].mlp).mix

    def mix(self: Any, hidden: Tensor, *others: Any) -> Tensor:
        return cut(self, hidden.detach(), *others) + hidden

    monkeypatch.setattr(type(coe.model.layers[0].mlp), "mix", mix)
    same(gradients(coe), gradients(coe, "eager"))


def test_only_some_iterations_are_asked(finished: list[WeightGradient]) -> None:
    """Calls whose output leads nowhere add nothing."""
    experts = model().model.layers[0].mlp.experts
    experts.config._experts_implementation = "expertmix"
    hidden = torch.randn(6, 16, dtype=torch.float64)
    index, weights = torch.arange(12).view(6, 2) % 5, torch.rand(6, 2, dtype=torch.float64)
    with one_gradient():
        first, second = (experts(hidden * times, index, weights) for times in (1, 2))
    second.sum().backward()
    assert first.requires_grad
    mine = kept(experts)
    experts.zero_grad()
    experts(hidden * 2, index, weights).sum().backward()
    same(mine, kept(experts))
    assert len(finished) == 4


def test_nothing_stays() -> None:
    """Outside of `one_gradient`, and after an error inside, calls make their own gradients."""
    with pytest.raises(ZeroDivisionError), one_gradient():
        _ = 1 / 0
    weight = torch.ones(2, 2, 2, requires_grad=True)
    assert deferred.shared(weight) == (weight, None)
    assert products.NAME == "expertmix"
