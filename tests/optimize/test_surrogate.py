from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from expertmix.core.pathway import Pathway
from expertmix.errors import ConfigError
from expertmix.optimize.samples import scores
from expertmix.optimize.surrogate import Surrogate

from .problems import only, problem_of, reordered
from .world import FakePathways, open_suffix, samples

RULES = [
    ("answer", "mean"), ("choice", "mean"), ("answer", "trimmed"), ("answer", "median"),
    ("choice", "median"),
]  # fmt: skip
WEIGHTS = [[0.5, 0.2, 0.3], [0.1, 0.45, 0.45]]


def world(**settings):
    fake = FakePathways(dtype=torch.float64, **settings)
    return problem_of(fake, samples(2), samples(3, seed=1), weights=WEIGHTS)


def slope(surrogate: Surrogate, values: Tensor, at: tuple[int, ...], width: float) -> Tensor:
    """(B,) central difference of the losses in one entry."""
    away = torch.zeros_like(values)
    away[at] = width
    return (surrogate.losses(values + away) - surrogate.losses(values - away)) / (2 * width)


@pytest.mark.parametrize(("objective", "aggregate"), RULES)
@pytest.mark.parametrize("mode", ["set", "add"])
def test_the_gradient_equals_finite_differences_in_float64(objective, aggregate, mode):
    """∂L/∂ω is (L(ω + h) − L(ω − h)) / 2h to 1e-7, and another sample's ω changes nothing."""
    problem = world(decisions=2)
    surrogate = Surrogate(problem, objective=objective, aggregate=aggregate, mode=mode)
    values = torch.randn(2, 2, 2, 6, dtype=torch.float64, generator=torch.manual_seed(0))
    losses, gradient = surrogate.gradient(values)
    assert torch.equal(losses, surrogate.losses(values))
    for at in [(0, 0, 0, 1), (0, 1, 1, 5), (1, 0, 1, 2), (1, 1, 0, 0)]:
        want = torch.zeros(2, dtype=torch.float64)
        want[at[0]] = gradient[at]
        torch.testing.assert_close(slope(surrogate, values, at, 1e-5), want, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("objective", ["answer", "choice"])
def test_the_gradient_equals_finite_differences_in_a_real_moe(objective):
    """In float32, with differences over 0.25, to 5 % of the largest slope."""
    with open_suffix() as suffix:
        problem = problem_of(suffix, samples(2), samples(3, seed=1), weights=WEIGHTS)
        surrogate = Surrogate(problem, objective=objective)
        _, gradient = surrogate.gradient(problem.start)
        largest = float(gradient.abs().max())
        assert largest > 0
        for number in gradient.abs().flatten().topk(4).indices:
            at = tuple(int(one) for one in torch.unravel_index(number, gradient.shape))
            found = slope(surrogate, problem.start, at, 0.25)[at[0]]
            assert abs(float(found - gradient[at])) < 0.05 * largest


@pytest.mark.parametrize(("objective", "aggregate"), RULES[:2])
def test_the_mean_is_the_papers_formula(objective, aggregate):
    """L(ω) = Σ K ℓ(f(xᵢ, ω), yᵢ) / Σ K, written as a loop over neighbors."""
    problem = world()
    values = problem.start
    fake, reference = problem.pathways, problem.reference
    for row in range(2):
        total = 0.0
        for slot in range(3):
            one = reference.samples[slot]
            batch = fake.batch([one.question], [{}])
            logprobs = fake.score(batch, Pathway(values[row : row + 1], problem.mass[:1], 6))
            if objective == "answer":
                loss = -logprobs[0, one.gold].sum() / len(one.question.options[one.gold])
            else:
                loss = -(scores(logprobs, [one])[0] / 0.5).log_softmax(0)[one.gold]
            total += WEIGHTS[row][slot] * float(loss)
        found = Surrogate(problem, objective=objective, temperature=0.5).losses(values)[row]
        assert float(found) == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize(("objective", "aggregate"), RULES)
def test_the_order_of_neighbors_changes_nothing(objective, aggregate):
    """A permuted neighborhood has the same losses and gradients, to 1e-12."""
    problem = world()
    settings = {"objective": objective, "aggregate": aggregate}
    want = Surrogate(problem, **settings).evaluate(problem.start, gradient=True)
    got = Surrogate(reordered(problem, [2, 0, 1]), **settings).evaluate(
        problem.start, gradient=True
    )
    torch.testing.assert_close(got.losses, want.losses, atol=1e-12, rtol=0)
    torch.testing.assert_close(got.gradient, want.gradient, atol=1e-12, rtol=0)
    torch.testing.assert_close(got.per_neighbor, want.per_neighbor[:, [2, 0, 1]])


@pytest.mark.parametrize("limit", [1, 2, 64])
def test_neither_batches_nor_other_samples_matter(limit):
    """Losses and gradients are the same alone, together, and with any limit on a batch."""
    with open_suffix() as suffix:
        near = [[0, 1], [1, 2], [4, 3], [0, 4]]
        problem = problem_of(suffix, samples(4), samples(5, seed=1), near)
        together = Surrogate(problem, limit=limit).evaluate(problem.start, gradient=True)
        for row in range(4):
            alone = Surrogate(only(problem, row)).evaluate(problem.start[[row]], gradient=True)
            torch.testing.assert_close(together.losses[[row]], alone.losses, atol=2e-6, rtol=0)
            torch.testing.assert_close(together.gradient[[row]], alone.gradient, atol=2e-6, rtol=0)


def test_an_expert_that_is_kept_out_has_no_gradient_and_breaks_nothing():
    """Entries of minus infinity have gradient 0, and nothing is NaN."""
    with open_suffix() as suffix:
        problem = problem_of(suffix, samples(2), samples(2, seed=1))
        values = problem.start.clone()
        values[..., 4:] = float("-inf")
        losses, gradient = Surrogate(problem).gradient(values)
        assert losses.isfinite().all()
        assert gradient.isfinite().all()
        assert (gradient[..., 4:] == 0).all()
        assert gradient[..., :4].abs().sum() > 0


def test_a_sample_without_neighbors_has_no_loss_and_no_gradient():
    """NaN and 0; the other sample does not notice."""
    fake = FakePathways()
    problem = problem_of(fake, samples(2), samples(2, seed=1), indices=[[-1, -1], [0, -1]])
    found = Surrogate(problem).evaluate(problem.start, gradient=True)
    assert found.losses.isnan().tolist() == [True, False]
    assert found.per_neighbor.isnan().tolist() == [[True, True], [False, True]]
    assert (found.gradient[0] == 0).all()
    assert found.gradient[1].abs().sum() > 0


def test_a_median_does_not_follow_one_poisoned_neighbor_of_three():
    """However bad the third is, the median of three alike stays between the other two."""
    fake = FakePathways(dtype=torch.float64)
    test, good, other, bad = samples(10, gold=[0] * 10)[::3]  # of one topic

    def losses(third, aggregate):
        problem = problem_of(fake, [test], [good, other, third])
        surrogate = Surrogate(problem, aggregate=aggregate)
        return float(surrogate.losses(problem.start)), surrogate.per_neighbor(problem.start)[0]

    for third in (bad, replace(bad, gold=1)):
        median, each = losses(third, "median")
        mean, _ = losses(third, "mean")
        assert median == pytest.approx(float(each.median()))
        assert mean == pytest.approx(float(each.mean()))


@pytest.mark.parametrize("limit", [2, 64])
def test_many_pathways_are_judged_as_each_alone(limit):
    """`many` is `losses` for each, in one batch or in several."""
    problem = world()
    tried = torch.randn(4, 2, 1, 2, 6, dtype=torch.float64)
    surrogate = Surrogate(problem, limit=limit)
    want = torch.stack([surrogate.losses(one) for one in tried])
    assert torch.equal(surrogate.many(tried), want)


def test_batches_are_made_once_for_all_steps():
    """The second evaluation makes no batch."""
    problem = world()
    fake, made = problem.pathways, []
    make = fake.batch

    def counted(*args, **settings):
        made.append(1)
        return make(*args, **settings)

    fake.batch = counted
    surrogate = Surrogate(problem)
    surrogate.losses(problem.start)
    count = len(made)
    surrogate.gradient(problem.start)
    assert len(made) == count > 0


@pytest.mark.parametrize(
    "settings",
    [
        {"objective": "best"}, {"aggregate": "mode"}, {"trim": 0.5}, {"temperature": 0.0},
        {"limit": 0},
    ],
)  # fmt: skip
def test_an_impossible_setting_is_an_error(settings):
    """ConfigError names it."""
    with pytest.raises(ConfigError, match=str(next(iter(settings.values())))):
        Surrogate(world(), **settings)


def test_a_neighbor_without_a_label_is_an_error():
    """ConfigError names the sample, before anything runs."""
    fake = FakePathways()
    nameless = replace(samples(1, seed=1)[0], gold=None)
    problem = problem_of(fake, samples(1), [nameless])
    with pytest.raises(ConfigError, match=nameless.name):
        Surrogate(problem, objective="choice")
