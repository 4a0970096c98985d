"""Laws of entropy, balance, Gini and specialization."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from expertmix.attribute import spread

counts = st.integers(0, 50)
loads = (st.lists(counts, min_size=1, max_size=12) | st.sampled_from([[0], [0, 0]])).map(
    torch.tensor
)


@given(loads)
def test_bounds(load_E: torch.Tensor) -> None:
    """Balance and Gini lie in 0..1, peak in 1..E; without any load all three are nan."""
    values = [spread.balance(load_E), spread.gini(load_E)]
    if int(load_E.sum()) == 0:
        assert all(math.isnan(value) for value in [*values, spread.peak(load_E)])
        return
    assert all(-1e-12 <= value <= 1 + 1e-12 for value in values)
    assert 1 - 1e-9 <= spread.peak(load_E) <= len(load_E) + 1e-9


@given(loads)
def test_order_does_not_matter(load_E: torch.Tensor) -> None:
    """Renumbering the experts changes no measure of evenness."""
    order = load_E.argsort()
    for measure in (spread.balance, spread.gini, spread.peak):
        assert measure(load_E[order]) == pytest.approx(measure(load_E), nan_ok=True)


@pytest.mark.parametrize("experts", [2, 3, 8, 128])
def test_extremes(experts: int) -> None:
    """An even load has balance 1, peak 1, Gini 0; a single hub has balance 0, peak E, Gini 1."""
    even, hub = torch.ones(experts), torch.eye(experts)[0]
    assert spread.balance(even) == pytest.approx(1)
    assert spread.peak(even) == pytest.approx(1)
    assert spread.gini(even) == pytest.approx(0, abs=1e-12)
    assert spread.balance(hub) == 0
    assert spread.peak(hub) == experts
    assert spread.gini(hub) == pytest.approx(1)


def test_gini_is_the_mean_absolute_difference() -> None:
    """Gini agrees with its definition: mean |x_i - x_j| over twice the mean, over (n - 1) / n."""
    mass_E = torch.tensor([0.1, 0.7, 0.05, 0.9, 0.3], dtype=torch.float64)
    raw = float((mass_E[:, None] - mass_E).abs().mean() / (2 * mass_E.mean()))
    assert spread.gini(mass_E) == pytest.approx(raw * 5 / 4)


def test_specialization() -> None:
    """Groups alike give 0, groups with experts of their own give 1, sizes do not matter."""
    assert spread.specialization(torch.tensor([[1.0, 2], [10, 20]])) == pytest.approx(0, abs=1e-12)
    assert spread.specialization(torch.eye(4) * torch.tensor([1, 5, 9, 2])) == pytest.approx(1)
    assert math.isnan(spread.specialization(torch.ones(1, 4)))
    assert math.isnan(spread.specialization(torch.tensor([[1.0, 1], [0, 0]])))
