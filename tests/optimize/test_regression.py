from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from expertmix.errors import ConfigError
from expertmix.optimize.neighbors import Finder
from expertmix.optimize.regression import KernelRegression, Search, mixed
from expertmix.optimize.surrogate import Surrogate
from expertmix.optimize.table import method_of

from .problems import only, problem_of
from .world import FakePathways, open_suffix, samples, topical

WEIGHTS = [[0.5, 0.2, 0.3], [0.1, 0.45, 0.45]]


def world(**settings):
    fake = FakePathways(**settings)
    return problem_of(fake, topical(2), topical(3, seed=1), weights=WEIGHTS)


def test_the_target_is_the_weighted_mean_of_the_neighbors_distributions():
    """ω̂ = Σ K softmax(ωᵢ) / Σ K, written as a loop."""
    problem = world(decisions=2)
    target = KernelRegression().target(problem)
    for row in range(2):
        want = sum(
            weight * problem.reference.start[slot].softmax(-1)
            for slot, weight in enumerate(WEIGHTS[row])
        )
        torch.testing.assert_close(target[row], want)


def test_alpha_one_is_the_base_bit_for_bit():
    """Nothing is changed."""
    problem = world()
    found = KernelRegression(Search(alpha=1.0)).solve(problem)
    assert not found.changed.any()
    assert torch.equal(found.values, problem.start)


def test_alpha_zero_is_the_regression_target():
    """softmax(values) is ω̂, and every sample is changed."""
    problem = world()
    found = KernelRegression(Search(alpha=0.0)).solve(problem)
    assert found.changed.all()
    torch.testing.assert_close(found.values.softmax(-1), KernelRegression().target(problem))


def test_between_them_distributions_are_mixed():
    """softmax(values) = α softmax(start) + (1 − α) ω̂."""
    problem = world()
    found = KernelRegression(Search(alpha=0.3)).solve(problem)
    want = 0.3 * problem.start.softmax(-1) + 0.7 * KernelRegression().target(problem)
    torch.testing.assert_close(found.values.softmax(-1), want)


@pytest.mark.parametrize("limit", [3, 64])
def test_the_search_takes_the_best_of_the_grid(limit):
    """α* = argmin L over the grid with the hard top K; the curve and both losses are reported."""
    problem = world()
    method = KernelRegression(Search(grid=5, limit=limit))
    found = method.solve(problem)
    surrogate, target = Surrogate(problem, width=2), method.target(problem)
    base = problem.start.softmax(-1)
    curve = torch.stack(
        [surrogate.losses(mixed(base, target, alpha)) for alpha in (1, 0.75, 0.5, 0.25, 0)], 1
    )
    torch.testing.assert_close(found.notes["curve"], curve, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.notes["alpha"], 1 - curve.argmin(1) / 4)
    torch.testing.assert_close(found.losses[1], curve.amin(1), atol=1e-6, rtol=1e-5)
    assert torch.equal(found.changed, found.notes["alpha"] < 1)


def test_neighbors_that_solved_it_are_followed():
    """Where their pathways are at the target and the sample's is not, α is 0 and L nearly 0."""
    fake = FakePathways(pull=1.0)
    problem = problem_of(fake, topical(2, topics=[5]), topical(3, topics=[5], seed=1))
    lost = problem.start.flip(-1)
    problem = replace(problem, start=lost)
    found = KernelRegression(Search(hard=False)).solve(problem)
    assert (found.notes["alpha"] == 0).all()
    torch.testing.assert_close(
        found.values.softmax(-1)[0, 0], fake.target(5, 20), atol=0.02, rtol=0
    )


@pytest.mark.parametrize("combine", ["median", "trimmed"])
def test_robust_targets_ignore_one_poisoned_pathway_of_three(combine):
    """However extreme the third is, the target stays what a far less extreme one makes it."""
    problem = world()

    def target(factor):
        start = problem.reference.start.clone()
        start[2] = torch.tensor([0, 0, 0, 0, 0, factor])
        poisoned = replace(problem, finder=Finder(replace(problem.reference, start=start)))
        return KernelRegression(combine=combine, cut=0.34).target(poisoned)

    torch.testing.assert_close(target(8.0), target(80.0), atol=2e-3, rtol=0)
    torch.testing.assert_close(target(8.0).sum(-1), torch.ones(2, 1, 2))


def test_nothing_is_nan_where_experts_are_kept_out():
    """An expert that neither base nor neighbors use is minus infinity, with α searched or given."""
    problem = world()
    problem.start[..., 5] = float("-inf")
    problem.reference.start[..., 5] = float("-inf")
    for alpha in ("search", 0.5):
        values = KernelRegression(Search(alpha=alpha)).solve(problem).values
        assert not values.isnan().any()
        assert (values[..., 5] == float("-inf")).all()


def test_a_sample_alone_is_as_in_a_batch_in_a_real_moe():
    """To 1e-6, with another α for each."""
    with open_suffix() as suffix:
        problem = problem_of(suffix, samples(3), samples(4, seed=1), [[0, 1], [1, 2], [3, -1]])
        together = KernelRegression().solve(problem)
        for row in range(3):
            alone = KernelRegression().solve(only(problem, row))
            torch.testing.assert_close(alone.values[0], together.values[row], atol=1e-6, rtol=0)


@pytest.mark.parametrize("settings", [{"alpha": 1.5}, {"alpha": "best"}, {"grid": 1}, {"cut": 0.5}])
def test_an_impossible_setting_is_an_error(settings):
    """ConfigError names its value."""
    with pytest.raises(ConfigError, match=str(next(iter(settings.values())))):
        method_of({"kind": "kernel_regression", **settings})
