from __future__ import annotations

import pytest
import torch

from expertmix.optimize.aggregate import earliest_best, influence, joined


def of(values, weights, aggregate, trim=0.25):
    values = torch.tensor(values, dtype=torch.float64)
    shares = influence(values, torch.tensor(weights, dtype=torch.float64), aggregate, trim)
    return float(joined(values, shares)), shares


def test_a_mean_is_weighted():
    """Σ w x / Σ w."""
    assert of([1.0, 2.0, 4.0], [1.0, 1.0, 2.0], "mean")[0] == pytest.approx(11 / 4)


def test_a_median_of_alike_is_the_median():
    """The middle of an odd number; between the two middle ones of an even number."""
    assert of([5.0, 1.0, 3.0], [1.0] * 3, "median")[0] == 3.0
    assert of([5.0, 1.0, 3.0, 4.0], [1.0] * 4, "median")[0] == pytest.approx(3.5)


def test_a_weighted_median_goes_with_half_of_the_weight():
    """Who holds more than half of the weight is the median."""
    assert of([5.0, 1.0, 3.0], [0.6, 0.2, 0.2], "median")[0] == 5.0


def test_a_trimmed_mean_is_the_mean_of_the_middle():
    """Of four alike, a quarter off at each end leaves the middle two."""
    assert of([100.0, 1.0, 3.0, 5.0], [1.0] * 4, "trimmed")[0] == pytest.approx(4.0)
    assert of([1.0, 3.0, 5.0], [1.0] * 3, "trimmed", 0.0)[0] == pytest.approx(3.0)


@pytest.mark.parametrize("far", [10.0, 1e9, float("inf")])
def test_one_of_three_moves_a_mean_as_far_as_it_likes_and_a_median_not_at_all(far):
    """Above the others, its value does not matter to the median, even if infinite."""
    assert of([1.0, 2.0, far], [1.0] * 3, "median")[0] == 2.0
    assert of([1.0, 2.0, far], [1.0] * 3, "mean")[0] > 4.0


@pytest.mark.parametrize("aggregate", ["mean", "trimmed", "median"])
def test_shares_sum_to_one_and_go_with_their_values(aggregate):
    """In any order; 0 for those without weight, and for all where none has any."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(20, 5, generator=generator, dtype=torch.float64)
    weights = torch.rand(20, 5, generator=generator, dtype=torch.float64)
    weights[:, 2] = 0
    weights[7] = 0
    shares = influence(values, weights, aggregate, 0.2)
    sums = torch.ones(20, dtype=torch.float64)
    sums[7] = 0
    torch.testing.assert_close(shares.sum(1), sums)
    assert (shares[:, 2] == 0).all()
    order = torch.randperm(5, generator=generator)
    again = influence(values[:, order], weights[:, order], aggregate, 0.2)
    torch.testing.assert_close(again, shares[:, order])


def test_the_best_is_the_first_of_those_that_rounding_tells_apart():
    """A later loss must be better by more than a last bit; NaN is best only where all are."""
    nan, inf = float("nan"), float("inf")
    losses = torch.tensor(
        [[5.0, nan, nan, 3.0], [4.4715714, 2.0, nan, inf], [4.4715710, 1.0, nan, 2.9999]]
    )
    assert earliest_best(losses).tolist() == [1, 2, 0, 2]
    assert torch.equal(earliest_best(losses.T, 1), earliest_best(losses))
