from __future__ import annotations

import math

import pytest
import torch

from expertmix.experts.ranks import Ranks, effective_rank, profile, size, stable_rank
from expertmix.experts.shelf import Shelf

from .world import deltas, random_adapter, zero


def test_equal_strengths_are_all_in_use():
    """Effective and stable rank of r equal singular values are r; of one, 1; of none, nan."""
    for measure in (effective_rank, stable_rank):
        assert measure(torch.full((5,), 0.3)) == pytest.approx(5)
        assert measure(torch.tensor([2.0])) == pytest.approx(1)
        assert math.isnan(measure(torch.zeros(0)))


def test_the_effective_rank_is_the_exponential_of_an_entropy():
    """exp(-Σ p log p) with p = σ² / Σσ², by hand."""
    singular = torch.tensor([2.0, 1.0, 0.5])
    shares = [value**2 / 5.25 for value in singular.tolist()]
    expected = math.exp(-sum(share * math.log(share) for share in shares))
    assert effective_rank(singular) == pytest.approx(expected)
    assert stable_rank(singular) == pytest.approx(5.25 / 4)


def test_sizes_are_norms_of_the_updates():
    """‖Δ‖_F of the updates themselves; of an adapter over all its modules together."""
    adapters = [random_adapter("a", 1, ["x", "y"]), random_adapter("b", 2, ["y"])]
    ranks = Ranks.of(Shelf.of(adapters))
    norms = [[float(delta.norm()) for delta in deltas(adapters, module)] for module in ("x", "y")]
    expected = torch.tensor(norms, dtype=torch.float64).T
    torch.testing.assert_close(ranks.size, expected)
    torch.testing.assert_close(ranks.total_size, expected.square().sum(1).sqrt())
    assert ranks.rank.tolist() == [[4, 4], [0, 4]]
    assert size(torch.tensor([3.0, 4.0])) == 5


def test_an_adapter_that_does_nothing_has_no_rank():
    """Rank and size 0, effective rank nan, no profile; the others are as without it."""
    shelf = Shelf.of([random_adapter("a", 1), zero(random_adapter("b", 2))])
    ranks = Ranks.of(shelf)
    assert ranks.rank[1].tolist() == [0]
    assert ranks.size[1].tolist() == [0]
    assert ranks.effective[1].isnan().all()
    assert ranks.mean_effective[1].isnan()
    assert profile(shelf)[1].isnan().all()
    torch.testing.assert_close(ranks.effective[0], Ranks.of(shelf.minus("b")).effective[0])


def test_a_profile_falls_from_one():
    """Mean of σ_i / σ_1 over modules; zero beyond an adapter's rank."""
    shelf = Shelf.of([random_adapter("a", 1, ["x", "y"], rank=4), random_adapter("b", 2, rank=2)])
    found = profile(shelf)
    singular = [one.singular / one.singular[0] for one in shelf.adapters[0].modules.values()]
    torch.testing.assert_close(found[0], torch.stack(singular).mean(0))
    assert found[:, 0].tolist() == [1, 1]
    assert found[1, 2:].tolist() == [0, 0]
