"""Evidence over modules and tokens, against sums that are taken one by one."""

from __future__ import annotations

import gc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from expertmix.errors import UnsupportedRuntimeError
from expertmix.routers.memory import CHUNK, KEPT, Memory, Past

E, MODULES = 3, 2


def run(real: Tensor, scores: list[Tensor], half_life: float | None, past: Past | None) -> Memory:
    memory = Memory(real, half_life, past)
    for score in scores:
        memory.add(score.flatten(0, 1), torch.ones(E, dtype=torch.bool))
        memory.pooled()
    return memory


def brute(real: Tensor, scores: list[Tensor], half_life: float | None, prior: float) -> Tensor:
    """(B, S, E) in float64, after the last module."""
    keep = 1.0 if half_life is None else 0.5 ** (1 / half_life)
    mean = torch.stack([score.double() for score in scores]).mean(0)
    found = torch.zeros_like(mean)
    for b in range(real.shape[0]):
        total, count = torch.zeros(E, dtype=torch.float64), 0.0
        for s in range(real.shape[1]):
            if real[b, s]:
                total, count = keep * total + mean[b, s], keep * count + 1
            found[b, s] = total / (count + prior)
    return found


def scores_of(shape: tuple[int, int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, E, generator=generator) for _ in range(MODULES)]


@given(
    length=st.sampled_from([1, 2, 7, CHUNK, CHUNK + 1, 2 * CHUNK + 5]),
    half_life=st.sampled_from([None, 0.5, 16.0]),
    prior=st.sampled_from([0.5, 4.0]),
    padded=st.booleans(),
    seed=st.integers(0, 5),
)
def test_pooled_evidence_is_the_decayed_mean(length, half_life, prior, padded, seed):
    """Equal to a loop over tokens in float64; padding is as if it was not there."""
    real = torch.ones(2, length, dtype=torch.bool)
    if padded:
        real = torch.rand(2, length, generator=torch.Generator().manual_seed(seed)) < 0.7
    scores = scores_of((2, length), seed)
    memory = Memory(real, half_life, prior=prior)
    for score in scores:
        memory.add(score.flatten(0, 1), torch.ones(E, dtype=torch.bool))
        found = memory.pooled()
    expected = brute(real, scores, half_life, prior)
    torch.testing.assert_close(found.view(2, length, E).double(), expected, rtol=1e-4, atol=1e-4)


@given(cut=st.integers(1, 39), half_life=st.sampled_from([None, 4.0]), padded=st.booleans())
def test_a_pass_goes_on_where_the_one_before_ended(cut, half_life, padded):
    """Read in two passes or in one, evidence is the same."""
    real = torch.ones(2, 40, dtype=torch.bool)
    if padded:
        real[0, :7] = False
    scores = scores_of((2, 40))
    whole = run(real, scores, half_life, None).past()
    first = run(real[:, :cut], [s[:, :cut] for s in scores], half_life, None).past()
    both = run(real[:, cut:], [s[:, cut:] for s in scores], half_life, first).past()
    torch.testing.assert_close(both.sums, whole.sums, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(both.counts, whole.counts, rtol=1e-4, atol=1e-4)
    assert whole.counts.shape[1] == KEPT


def test_what_is_kept_can_be_cut_back():
    """Without the latest positions it is as if they had not been read; beyond that it is lost."""
    real, scores = torch.ones(1, 20, dtype=torch.bool), scores_of((1, 20))
    whole = run(real, scores, 4.0, None).past()
    shorter = run(real[:, :15], [s[:, :15] for s in scores], 4.0, None).past()
    back = whole.cut(5)
    torch.testing.assert_close(back.sums[:, -1], shorter.sums[:, -1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(back.counts[:, -1], shorter.counts[:, -1])
    assert whole.cut(20) is None


def test_rows_are_taken_and_repeated():
    """Evidence follows its row."""
    past = Past(torch.arange(2.0).view(2, 1, 1, 1), torch.arange(2.0).view(2, 1))
    assert past.rows(torch.tensor([1, 1, 0])).counts.flatten().tolist() == [1, 1, 0]
    assert past.repeated(2).sums.flatten().tolist() == [0, 0, 1, 1]


def test_an_adapter_is_judged_by_the_modules_that_it_has():
    """The mean of an adapter at one module of two is not halved; without any it is zero."""
    memory = Memory(torch.ones(1, 1, dtype=torch.bool), None)
    memory.add(torch.tensor([[2.0, 2.0, 9.0]]), torch.tensor([True, True, False]))
    memory.add(torch.tensor([[4.0, 9.0, 9.0]]), torch.tensor([True, False, False]))
    assert memory.pooled().tolist() == [[3.0, 2.0, 0.0]]


def test_gradients_reach_the_evidence():
    """Pooling is differentiable in what is added."""
    score = torch.randn(1, 5, E, dtype=torch.float64, requires_grad=True)

    def pooled(value: Tensor) -> Tensor:
        memory = Memory(torch.ones(1, 5, dtype=torch.bool), 4.0, prior=1.0)
        memory.add(value.flatten(0, 1).float(), torch.ones(E, dtype=torch.bool))
        return memory.pooled()[-1, 0]

    (gradient,) = torch.autograd.grad(pooled(score), score)
    assert (gradient[0, :, 0] > 0).all()
    assert (gradient[0, 1:, 0] > gradient[0, :-1, 0]).all()


def test_padding_before_the_first_token_is_no_evidence_without_a_prior_either():
    """Zero tokens and no prior give zero, not nan, which attention would spread."""
    memory = Memory(torch.tensor([[False, False, True]]), 16.0)
    memory.add(torch.ones(3, E), torch.ones(E, dtype=torch.bool))
    assert memory.pooled().tolist() == [[0.0] * E, [0.0] * E, [1.0] * E]


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_a_pass_over_no_token(shape):
    """Nothing is gathered of nothing, and nothing breaks."""
    memory = run(torch.ones(shape, dtype=torch.bool), scores_of(shape), 16.0, None)
    assert memory.past().sums.shape == (*shape, MODULES, E)
    assert memory.tokens == 0


def test_a_long_pass_keeps_its_end_alone():
    """While it runs, evidence at all tokens is kept once, not once per module."""
    columns, width = 4 * CHUNK, 41
    memory = Memory(torch.ones(1, columns, dtype=torch.bool), None)
    for _ in range(8):
        memory.add(torch.randn(columns, width), torch.ones(width, dtype=torch.bool))
        memory.pooled()
    alive = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for value in gc.get_objects()
        if type(value) is Tensor and value.shape[-1:] == (width,)
    }
    assert sum(size >= 4 * columns * width for size in alive.values()) <= 2
    assert memory.past().sums.shape == (1, KEPT, 8, width)


def test_more_modules_than_before_are_refused():
    """Evidence of a pass that ran fewer modules cannot be continued by one that runs more."""
    real = torch.ones(1, 4, dtype=torch.bool)
    past = run(real, scores_of((1, 4))[:1], None, None).past()
    with pytest.raises(UnsupportedRuntimeError, match="more modules"):
        run(real, scores_of((1, 4)), None, past)
