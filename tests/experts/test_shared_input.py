from __future__ import annotations

import gc
import weakref

import pytest
import torch

from expertmix.experts.shared_input import SharedInput, groups
from expertmix.experts.shelf import Shelf
from expertmix.experts.stack import Projections, Reading

from .world import random_adapter

MODULES = ("attn.q_proj", "attn.k_proj", "attn.v_proj")


def shared(modules=MODULES, projections: Projections = "exact", whole: bool = True) -> SharedInput:
    adapters = [random_adapter("a", 1, MODULES, rank=3), random_adapter("b", 2, MODULES[:2])]
    return SharedInput(Shelf.of(adapters), modules, reading=Reading(whole, projections))


def inputs(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(seed))


def test_groups_are_what_reads_one_tensor():
    """q, k, v belong together, gate and up too, per layer; o and down stand alone."""
    names = {
        f"layers.{layer}.{name}": 32
        for layer in (0, 1)
        for name in (
            "self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
            "mlp.up_proj", "mlp.down_proj",
        )
    }  # fmt: skip
    assert [tuple(name.rpartition(".")[2] for name in group) for group in groups(names)] == [
        ("q_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",),
    ] * 2  # fmt: skip
    assert sorted(name for group in groups(names) for name in group) == sorted(names)


def test_modules_of_another_width_do_not_share():
    """RWKV's `key` and `value` have the names of a pair, and read different tensors."""
    assert groups({"ff.key": 32, "ff.value": 128}) == (("ff.key",), ("ff.value",))


def test_a_shared_product_is_each_modules_own():
    """Projections from the shared product are those of the module alone."""
    hidden = inputs()
    together = shared()
    for module in MODULES:
        expected = shared((module,)).seen(hidden, module).projected
        torch.testing.assert_close(together.seen(hidden, module).projected, expected)


@pytest.mark.parametrize("asking", [MODULES[:1], MODULES[1:2], MODULES[2:]])
def test_nothing_is_multiplied_before_it_is_asked_for(asking):
    """A pass that nobody asks costs nothing and leaves nothing; any module may be the first to."""
    hidden, together = inputs(), shared()
    for module in MODULES:
        seen = together.seen(hidden, module)
        if module in asking:
            expected = shared((module,)).seen(hidden, module).projected
            torch.testing.assert_close(seen.projected, expected)
        else:
            assert seen._projected is None
    assert together._held is None


def test_a_sieve_is_shared_and_can_be_left_out():
    """The rough product serves all modules, is coarse, and is not there where it must not be."""
    hidden, together = inputs(), shared(projections="sieved")
    for module in MODULES:
        seen = together.seen(hidden, module)
        exact = shared((module,)).seen(hidden, module).projected
        assert seen.rough.projected.dtype == torch.bfloat16
        torch.testing.assert_close(seen.rough.projected.float(), exact, rtol=0.05, atol=0.05)
        torch.testing.assert_close(seen.projected, exact)
        assert together.seen(hidden, module, exact=True).rough is None
    assert together._held is None
    for lone in (shared(projections="sieved", whole=False), shared(projections=None)):
        assert lone.seen(hidden, MODULES[0]).rough is None
    half = shared(projections="sieved").seen(hidden.half(), MODULES[0])
    assert half.rough is None


def test_another_tensor_is_not_mistaken():
    """Another tensor, or the same one changed in place, is projected anew."""
    together, hidden = shared(), inputs()
    _ = together.seen(hidden, MODULES[0]).projected
    other = inputs(1)
    expected = shared((MODULES[1],)).seen(other, MODULES[1]).projected
    torch.testing.assert_close(together.seen(other, MODULES[1]).projected, expected)
    _ = together.seen(hidden, MODULES[0]).projected
    hidden.copy_(other)
    torch.testing.assert_close(together.seen(hidden, MODULES[1]).projected, expected)


def test_a_product_without_graph_serves_no_backward():
    """What was computed without gradients is not used with them."""
    together, hidden = shared(), inputs().requires_grad_()
    with torch.no_grad():
        _ = together.seen(hidden, MODULES[0]).projected
    assert together.seen(hidden, MODULES[1]).projected.requires_grad


def test_nothing_is_kept_alive():
    """After the last module of the group neither input nor product is held."""
    together, hidden = shared(), inputs()
    products = [weakref.ref(together.seen(hidden, module).projected) for module in MODULES]
    held = weakref.ref(hidden)
    del hidden
    gc.collect()
    assert held() is None
    assert all(product() is None for product in products)
    assert together._held is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_stack_follows_the_type_of_the_input(dtype):
    """A model that is cast after the shelf was put on it goes on working."""
    together = shared()
    _ = together.seen(inputs(), MODULES[0]).projected
    assert together.seen(inputs().to(dtype), MODULES[0]).projected.dtype == dtype


def test_a_stack_made_in_inference_mode_serves_training_too():
    """The first call may be in inference mode; a later backward works all the same."""
    together = shared()
    with torch.inference_mode():
        for module in MODULES:
            _ = together.seen(inputs(), module).projected
    hidden = inputs().requires_grad_()
    together.seen(hidden, MODULES[0]).projected.sum().backward()
    assert hidden.grad is not None


def test_a_tensor_that_joins_a_graph_later_is_projected_anew():
    """What was computed before the input required gradients has no graph, and is not used."""
    together, hidden = shared(), inputs()
    _ = together.seen(hidden, MODULES[0]).projected
    hidden.requires_grad_()
    assert together.seen(hidden, MODULES[1]).projected.requires_grad
