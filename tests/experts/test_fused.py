from __future__ import annotations

import pytest
import torch
from routers.world import MODULE, hidden_states, stack_of
from torch import Tensor

from expertmix.experts import stack as stack_file
from expertmix.experts.fused import SPARSE, combine, dense, sparse
from expertmix.experts.lora import Adapter
from expertmix.experts.stack import Stack
from expertmix.routers.seen import Seen

from .world import deltas, naive_outputs, random_adapter, zero

WAYS = pytest.mark.parametrize("way", [dense, sparse])
EQUAL, MIXED = (4, 4, 4, 4, 4), (4, 2, 4, 8, 3)
RANKS = pytest.mark.parametrize("ranks", [EQUAL, MIXED])


def shelf(ranks=MIXED) -> list[Adapter]:
    return [random_adapter(f"a{i}", i, rank=rank) for i, rank in enumerate(ranks)]


def seen(stack: Stack, hidden: Tensor) -> Seen:
    return Seen(hidden, stack.directions, module=MODULE)


def decisions(tokens: int, experts: int, top_k: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    indices = torch.rand(tokens, experts, generator=generator).topk(top_k).indices
    return indices, torch.randn(tokens, top_k, generator=generator, dtype=torch.float64)


def table(indices: Tensor, weights: Tensor, experts: int) -> Tensor:
    return weights.new_zeros(len(weights), experts).scatter_add(1, indices, weights)


def naive_aligned(x_TD: Tensor, updates: list[Tensor], weights_TE: Tensor) -> Tensor:
    """(Σ w_i U_i S_i)(Σ w_i V_iᵀ) x from full SVDs, signs as `decompose` has them."""
    factors = []
    for update in updates:
        left, singular, right = torch.linalg.svd(update, full_matrices=False)
        signs = (right @ torch.arange(right.shape[1]).to(right).cos())[:, None].sign()
        keep = (singular > 1e-9)[:, None]
        factors.append((left * singular * signs.T * keep.T, right * signs * keep))
    rows = []
    for x, weights in zip(x_TD, weights_TE, strict=True):
        up = sum(w * b for w, (b, _) in zip(weights, factors, strict=True))
        down = sum(w * a for w, (_, a) in zip(weights, factors, strict=True))
        rows.append(up @ (down @ x))
    return torch.stack(rows)


@WAYS
@RANKS
@pytest.mark.parametrize("top_k", [1, 3, 5])
def test_outputs_are_those_of_the_naive_loop(way, ranks, top_k):
    """Σ w_i scale_i B_i A_i x in float64, by a loop over tokens and adapters."""
    adapters, hidden = shelf(ranks), hidden_states()
    stack = stack_of(adapters)
    indices, weights = decisions(11, 5, top_k)
    found = way(stack, seen(stack, hidden), indices, weights, "outputs")
    expected = naive_outputs(hidden, deltas(adapters, MODULE), table(indices, weights, 5))
    torch.testing.assert_close(found, expected)


@WAYS
@RANKS
@pytest.mark.parametrize("top_k", [1, 3, 5])
def test_aligned_factors_are_those_of_the_naive_loop(way, ranks, top_k):
    """(Σ w_i B*_i)(Σ w_i A*_i) x in float64, by a loop, with canonical signs."""
    adapters, hidden = shelf(ranks), hidden_states()
    stack = stack_of(adapters)
    indices, weights = decisions(11, 5, top_k)
    found = way(stack, seen(stack, hidden), indices, weights, "aligned")
    expected = naive_aligned(hidden, deltas(adapters, MODULE), table(indices, weights, 5))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("how", ["outputs", "aligned"])
def test_both_ways_agree_whatever_was_decided(how):
    """Dense and sparse agree also where an adapter does nothing, or fills a slot with zero."""
    adapters = [zero(random_adapter("null", 9)), *shelf()]
    stack, hidden = stack_of(adapters), hidden_states()
    indices, weights = decisions(11, 6, 4)
    indices[0], weights[0, 1:] = 0, 0
    projected = seen(stack, hidden)
    torch.testing.assert_close(
        dense(stack, projected, indices, weights, how),
        sparse(stack, projected, indices, weights, how),
    )


@WAYS
@RANKS
@pytest.mark.parametrize("tokens", [3, 70])
@pytest.mark.parametrize("how", ["outputs", "aligned"])
def test_blocks_of_columns_change_nothing(way, ranks, tokens, how, monkeypatch):
    """Ways up that lie in blocks of columns give what they give in one piece."""
    adapters, hidden = shelf(ranks), hidden_states(tokens)
    indices, weights = decisions(tokens, 5, 2)
    whole = stack_of(adapters)
    monkeypatch.setattr(stack_file, "BLOCK", 16)
    monkeypatch.setattr(stack_file, "NEAR", (1, 10**6))
    blocks = stack_of(adapters)
    assert (len(whole.up), len(blocks.up)) == (1, 3)
    expected = way(whole, seen(whole, hidden), indices, weights, how)
    found = way(blocks, seen(blocks, hidden), indices, weights, how)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("how", ["outputs", "aligned"])
def test_what_nobody_asked_for_is_not_multiplied(how):
    """From a pass without a product the selected alone are projected, with the same result."""
    adapters = shelf([4, 2, 8] * 14)
    stack, hidden = stack_of(adapters), hidden_states(200)
    indices, weights = decisions(200, 42, 2)
    lazy, whole = seen(stack, hidden), seen(stack, hidden)
    assert whole.projected.shape[1] == len(stack.directions.owner)
    found = combine(stack, lazy, indices, weights, how)
    assert lazy._projected is None
    torch.testing.assert_close(found, combine(stack, whole, indices, weights, how))
    table_TE = table(indices, weights, 42)
    if how == "outputs":
        torch.testing.assert_close(found, naive_outputs(hidden, deltas(adapters, MODULE), table_TE))


@pytest.mark.parametrize("how", ["outputs", "aligned"])
def test_one_adapter_alone_is_itself_in_both_combinations(how):
    """With one adapter of weight one there are no cross terms: scale B A x."""
    adapters, hidden = shelf(), hidden_states()
    stack = stack_of(adapters)
    indices = torch.full((11, 1), 3)
    found = combine(stack, seen(stack, hidden), indices, torch.ones(11, 1), how)
    torch.testing.assert_close(found, hidden @ deltas(adapters, MODULE)[3].T)


def test_many_adapters_are_sparse(monkeypatch):
    """Only the selected are multiplied where all others outnumber them by far."""
    from expertmix.experts import fused

    called = []
    for way in (dense, sparse):
        monkeypatch.setattr(
            fused, way.__name__, lambda *args, way=way: called.append(way) or way(*args)
        )
    for experts, expected in ((SPARSE, dense), (SPARSE + 1, sparse)):
        stack = stack_of(shelf([2] * experts))
        projected = seen(stack, hidden_states())
        combine(
            stack, projected, torch.zeros(11, 1, dtype=torch.int64), torch.ones(11, 1), "outputs"
        )
        assert called.pop() is expected


@WAYS
@pytest.mark.parametrize("how", ["outputs", "aligned"])
def test_gradients_reach_inputs_and_weights(way, how):
    """Gradients for hidden states and for weights are those of finite differences."""
    stack = stack_of(shelf((3, 2, 3)))
    indices, weights = decisions(3, 3, 2)

    def run(hidden: Tensor, weights: Tensor) -> Tensor:
        return way(stack, seen(stack, hidden), indices, weights, how)

    hidden = hidden_states(3).requires_grad_()
    assert torch.autograd.gradcheck(run, [hidden, weights.requires_grad_()])


@WAYS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_any_floating_type(way, dtype):
    """Half precision gives half precision, near what float64 gives."""
    adapters = shelf()
    stack, exact = stack_of(adapters, dtype), stack_of(adapters)
    indices, weights = decisions(11, 5, 3)
    hidden = hidden_states()
    fine = way(exact, seen(exact, hidden), indices, weights, "outputs")
    projected = seen(stack, hidden.to(dtype))
    found = way(stack, projected, indices, weights.to(dtype), "outputs")
    assert found.dtype == dtype
    error = (found.double() - fine).norm() / fine.norm()
    assert float(error) < 20 * torch.finfo(dtype).eps
