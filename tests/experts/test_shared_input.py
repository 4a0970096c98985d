from __future__ import annotations

import gc
import weakref

import pytest
import torch

from expertmix.experts.shared_input import SharedInput, groups
from expertmix.experts.shelf import Shelf

from .world import random_adapter

MODULES = ("attn.q_proj", "attn.k_proj", "attn.v_proj")


def shared(modules=MODULES) -> SharedInput:
    adapters = [random_adapter("a", 1, MODULES, rank=3), random_adapter("b", 2, MODULES[:2])]
    return SharedInput(Shelf.of(adapters), modules)


def inputs(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(seed))


def test_groups_are_what_reads_one_tensor():
    """q, k, v belong together, gate and up too, per layer; o and down stand alone."""
    names = [
        f"layers.{layer}.{name}"
        for layer in (0, 1)
        for name in (
            "self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
            "mlp.up_proj", "mlp.down_proj",
        )
    ]  # fmt: skip
    assert [tuple(name.rpartition(".")[2] for name in group) for group in groups(names)] == [
        ("q_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",),
    ] * 2  # fmt: skip
    assert sorted(name for group in groups(names) for name in group) == sorted(names)


def test_a_shared_product_is_each_modules_own():
    """Projections from the shared product are those of the module alone."""
    hidden = inputs()
    together = shared()
    for module in MODULES:
        expected = shared((module,)).project(hidden, module)
        torch.testing.assert_close(together.project(hidden, module), expected)


def test_another_tensor_is_not_mistaken():
    """Another tensor, or the same one changed in place, is projected anew."""
    together, hidden = shared(), inputs()
    together.project(hidden, MODULES[0])
    other = inputs(1)
    expected = shared((MODULES[1],)).project(other, MODULES[1])
    torch.testing.assert_close(together.project(other, MODULES[1]), expected)
    together.project(hidden, MODULES[0])
    hidden.copy_(other)
    torch.testing.assert_close(together.project(hidden, MODULES[1]), expected)


def test_a_product_without_graph_serves_no_backward():
    """What was computed without gradients is not used with them."""
    together, hidden = shared(), inputs().requires_grad_()
    with torch.no_grad():
        together.project(hidden, MODULES[0])
    assert together.project(hidden, MODULES[1]).requires_grad


def test_nothing_is_kept_alive():
    """After the last module of the group neither input nor product is held."""
    together, hidden = shared(), inputs()
    products = [weakref.ref(together.project(hidden, module)) for module in MODULES]
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
    together.project(inputs(), MODULES[0])
    assert together.project(inputs().to(dtype), MODULES[0]).dtype == dtype


def test_a_stack_made_in_inference_mode_serves_training_too():
    """The first call may be in inference mode; a later backward works all the same."""
    together = shared()
    with torch.inference_mode():
        for module in MODULES:
            together.project(inputs(), module)
    hidden = inputs().requires_grad_()
    together.project(hidden, MODULES[0]).sum().backward()
    assert hidden.grad is not None
