"""Sparse and dense views of a decision."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from expertmix.core.decision import Decision, concatenate


@given(st.integers(0, 5), st.integers(1, 4), st.integers(4, 7), st.integers(0, 2**16))
def test_dense_is_the_sum_of_slots(tokens, top_k, experts, seed):
    """dense()[n, e] is the sum of the weights of the slots that hold e; -1 counts nowhere."""
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(-1, experts, (tokens, top_k), generator=generator)
    weights = torch.rand(tokens, top_k, generator=generator)
    brute = torch.zeros(tokens, experts)
    for n in range(tokens):
        for k in range(top_k):
            if indices[n, k] >= 0:
                brute[n, indices[n, k]] += weights[n, k]
    torch.testing.assert_close(Decision(indices, weights, experts).dense(), brute)


def test_joining_fills_narrow_parts():
    """Parts of different width join into the widest; missing slots are -1 with weight 0."""
    narrow = Decision(torch.tensor([[1]]), torch.tensor([[0.5]]), 4)
    wide = Decision(torch.tensor([[2, 3]]), torch.tensor([[0.1, 0.9]]), 4)
    joined = concatenate([narrow, wide])
    assert joined.indices.tolist() == [[1, -1], [2, 3]]
    assert torch.equal(joined.dense(), torch.cat([narrow.dense(), wide.dense()]))


def test_dense_is_differentiable():
    """The gradient of a dense weight arrives at its slot."""
    weights = torch.tensor([[0.25, 0.75]], requires_grad=True)
    Decision(torch.tensor([[2, 0]]), weights, 3).dense()[0, 2].backward()
    assert weights.grad.tolist() == [[1.0, 0.0]]
