from __future__ import annotations

import torch
from experts.world import random_adapter, zero

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
