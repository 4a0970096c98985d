from __future__ import annotations

import pytest
import torch
from experts.world import random_adapter, zero

from expertmix.routers import directions as directions_file

from .world import directions_of, hidden_states, planted


def test_norms_follow_the_shelf_for_mixed_ranks():
    """Scores stand in the shelf's order, whatever the ranks; nothing for B = 0."""
    adapters = [
        random_adapter("a", 1, rank=4), random_adapter("b", 2, rank=2),
        zero(random_adapter("c", 3)), random_adapter("d", 4, rank=4),
    ]  # fmt: skip
    directions = directions_of(adapters)
    hidden = hidden_states()
    scores = directions.norms(directions.project(hidden))
    for expert in (0, 1, 3):
        alone = directions_of([adapters[expert]])
        torch.testing.assert_close(scores[:, expert], alone.norms(alone.project(hidden))[:, 0])
    assert torch.isneginf(scores[:, 2]).all()
    assert directions.available.tolist() == [True, True, False, True]
    assert directions.ranks.tolist() == [4, 2, 1, 4]
    assert directions.count == 3


def test_sizes_are_frobenius_norms():
    """The size of an adapter is ‖scale B A‖."""
    adapters = planted(3, 4, sizes=[1.0, 2.0, 0.5])
    expected = [
        float((f.scale * f.up @ f.down).norm())
        for adapter in adapters
        for f in adapter.factors.values()
    ]
    torch.testing.assert_close(
        directions_of(adapters).sizes, torch.tensor(expected, dtype=torch.float64)
    )


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_some_are_some_of_all(tokens, grad):
    """v·x of a few adapters are those of the whole product; no token, with a graph too, is none."""
    directions = directions_of([random_adapter(f"a{i}", i, rank=2 + i % 3) for i in range(40)])
    hidden = hidden_states(5)[:tokens].requires_grad_(grad)
    indices = torch.arange(80).view(40, 2)[:tokens] % 40
    found = directions.some(hidden, indices)
    assert found.shape == (tokens, 2, 4)
    assert found.requires_grad == grad
    rows = directions.rows[indices]
    expected = directions.project(hidden).gather(1, rows.flatten(1)).view_as(rows)
    torch.testing.assert_close(found, directions.masked(expected, indices))


def test_without_a_private_operator_rows_are_copied(monkeypatch):
    """A version of PyTorch without the operator that takes dots of rows gives the same."""
    directions = directions_of([random_adapter(f"a{i}", i) for i in range(40)])
    hidden, indices = hidden_states(5), torch.arange(10).view(5, 2)
    expected = directions.some(hidden, indices)
    monkeypatch.setattr(directions_file, "_dots_of_rows", lambda: None)
    torch.testing.assert_close(directions.some(hidden, indices), expected)
