"""Where each token stands: samples and positions over passes, caches and padding."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from expertmix.core.tokens import Bookkeeper


def ids(rows, columns):
    return torch.ones(rows, columns, dtype=torch.int64)


@given(
    st.integers(1, 4),
    st.integers(1, 6),
    st.lists(st.integers(1, 3), max_size=4),
    st.integers(0, 2**16),
)
def test_positions_count_real_tokens(rows, prompt, chunks, seed):
    """Over prefill and any chunks of decoding, each row's real tokens are numbered 0, 1, 2, …"""
    generator = torch.Generator().manual_seed(seed)
    book = Bookkeeper()
    seen = [[] for _ in range(rows)]
    read = 0
    for columns in [prompt, *chunks]:
        real = torch.rand(rows, columns, generator=generator) < 0.7
        at = book.read(ids(rows, columns), real, past=read)
        read += columns
        assert torch.equal(at.tokens.position == -1, ~real.flatten())
        for row, position, keep in zip(at.row, at.tokens.position, at.tokens.real, strict=True):
            seen[int(row)] += [int(position)] if keep else []
    assert all(row == list(range(len(row))) for row in seen)


def test_positions_go_back_with_the_cache():
    """When a cache is cut back, the next tokens take the places of those that were dropped."""
    book = Bookkeeper()
    real = torch.tensor([[False, True, True], [True, True, True]])
    book.read(ids(2, 3), real)
    draft = book.read(ids(2, 4), ids(2, 4).bool(), past=3)
    again = book.read(ids(2, 2), ids(2, 2).bool(), past=4)
    assert draft.tokens.position.tolist() == [2, 3, 4, 5, 3, 4, 5, 6]
    assert again.tokens.position.tolist() == [3, 4, 4, 5]
    assert again.tokens.sample.tolist() == [0, 0, 1, 1]
    assert again.prompt_length.tolist() == [2, 2, 3, 3]


def test_a_new_batch_begins_new_samples():
    """Samples are numbered on; a cache that goes on keeps them; another batch size starts anew.

    Its positions start behind what its cache holds.
    """
    book = Bookkeeper()
    first = book.read(ids(2, 3), ids(2, 3).bool(), past=0)
    more = book.read(ids(2, 1), ids(2, 1).bool(), past=3)
    second = book.read(ids(1, 2), ids(1, 2).bool(), past=0)
    other = book.read(ids(3, 1), ids(3, 1).bool(), past=2)
    assert first.tokens.sample.unique().tolist() == more.tokens.sample.tolist() == [0, 1]
    assert second.tokens.sample.tolist() == [2, 2]
    assert other.tokens.sample.tolist() == [3, 4, 5]
    assert other.tokens.position.tolist() == [2, 2, 2]
    assert other.prompt_length.tolist() == [3, 3, 3]
