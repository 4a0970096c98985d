from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from expertmix.core.pathway import Pathway
from expertmix.errors import ConfigError
from expertmix.optimize.descent import NGD
from expertmix.optimize.surrogate import Surrogate
from expertmix.optimize.trust import divergence

from .problems import problem_of
from .world import FakePathways, open_suffix, topical

LONG = NGD(steps=300, lr=0.3, final_lr=1e-3, core=None)


@pytest.mark.parametrize("optimizer", ["adam", "gd"])
def test_the_planted_optimum_is_found(optimizer):
    """Neighbors of one topic: ω ends at the topic's target to 0.02, whatever its start."""
    fake = FakePathways(dtype=torch.float64)
    problem = problem_of(fake, topical(3, topics=[5]), topical(3, topics=[5], seed=1))
    method = replace(LONG, optimizer=optimizer, lr=0.3 if optimizer == "adam" else 20.0)
    found = method.solve(problem)
    want = fake.target(5, 20).expand(3, 1, 2, 6)
    torch.testing.assert_close(found.values.softmax(-1), want, atol=0.02, rtol=0)
    assert found.changed.all()
    assert found.losses.shape == (301, 3)
    assert (found.losses[-1] < 1e-3).all()


def test_each_sample_finds_the_optimum_of_its_own_neighbors():
    """Two topics in one problem do not mix."""
    fake = FakePathways(dtype=torch.float64)
    references = [*topical(2, topics=[5], seed=1), *topical(2, topics=[6], seed=2)]
    problem = problem_of(fake, topical(2), references, [[0, 1], [2, 3]])
    found = LONG.solve(problem).values.softmax(-1)
    for row, topic in enumerate((5, 6)):
        want = fake.target(topic, 20)[None]
        torch.testing.assert_close(found[row], want, atol=0.02, rtol=0)


@pytest.mark.parametrize("mode", ["set", "add"])
def test_no_steps_are_the_base_bit_for_bit(mode):
    """Nothing is changed, and the values are the start, also outside the core."""
    problem = problem_of(FakePathways(), topical(3), topical(3, seed=1))
    found = NGD(steps=0, parameter=mode, core=3).solve(problem)
    assert not found.changed.any()
    want = problem.start if mode == "set" else torch.zeros_like(problem.start)
    assert torch.equal(found.values, want)
    assert found.losses.shape == (1, 3)


def test_only_the_core_is_called_and_moved():
    """Outside the base's top n all is minus infinity; inside nothing is, and nothing is NaN."""
    problem = problem_of(FakePathways(), topical(3), topical(3, seed=1))
    found = NGD(core=3).solve(problem)
    core = torch.zeros_like(problem.start, dtype=torch.bool)
    core.scatter_(-1, problem.start.topk(3, dim=-1).indices, True)
    assert torch.equal(found.values.isfinite(), core)
    assert (found.values[~core] == float("-inf")).all()


def test_a_hard_descent_moves_only_who_is_called():
    """With the top K called, all others keep their logits until they are called."""
    problem = problem_of(FakePathways(), topical(3), topical(3, seed=1))
    found = NGD(steps=1, hard=True, core=None).solve(problem)
    moved = found.values != problem.start
    assert (moved.sum(-1) <= 2).all()
    assert moved.any()


def test_a_shift_is_one_for_all_decision_tokens():
    """Mode add starts at 0, has no minus infinity, and one slot for D tokens."""
    problem = problem_of(FakePathways(decisions=3), topical(2), topical(3, seed=1))
    found = NGD(parameter="add", core=4).solve(problem)
    assert found.mode == "add"
    assert found.values.shape == (2, 1, 2, 6)
    assert found.values.isfinite().all()
    assert (found.losses[-1] < found.losses[0]).all()


def test_the_best_step_is_kept_when_asked_for():
    """With a rate that overshoots, `best` ends no higher than any step, `last` does not."""
    problem = problem_of(FakePathways(pull=1.0), topical(3), topical(3, seed=1))
    wild = NGD(steps=6, lr=5.0, final_lr=5.0, core=None)
    best = replace(wild, keep="best").solve(problem)
    dense = Surrogate(problem)
    torch.testing.assert_close(dense.losses(best.values), best.losses.amin(0), atol=1e-6, rtol=0)
    assert (dense.losses(wild.solve(problem).values) > best.losses.amin(0)).any()


@pytest.mark.parametrize("limit", [1e-4, 0.05])
@pytest.mark.parametrize("mode", ["set", "add"])
def test_the_trust_region_is_respected(limit, mode):
    """KL(ω ‖ base) ≤ limit for every sample, and it binds."""
    problem = problem_of(FakePathways(), topical(3), topical(3, seed=1))
    found = NGD(trust=limit, parameter=mode, core=4).solve(problem)
    assert (divergence(found.values, problem.start, mode) <= limit).all()
    free = NGD(parameter=mode, core=4).solve(problem)
    assert (free.notes["kl"] > 0.05).all()
    assert (found.notes["kl"] > 0.9 * limit).all()


def test_a_poisoned_neighbor_pulls_the_mean_and_not_the_median():
    """Two of three want the target of option 20: the median ends there, the mean between."""
    fake = FakePathways(dtype=torch.float64)
    good = topical(2, topics=[5], seed=1)
    poison = replace(topical(1, topics=[5], seed=2)[0], gold=1)
    problem = problem_of(fake, topical(1, topics=[5]), [*good, poison])
    target = fake.target(5, 20)

    def away(aggregate):
        found = replace(LONG, aggregate=aggregate).solve(problem)
        return float((found.values.softmax(-1)[0, 0] - target).abs().max())

    assert away("median") < 0.02
    assert away("mean") > 0.1


def test_a_loss_that_is_not_a_number_keeps_the_base():
    """A sample with a broken neighbor stays, says so, and no other sample notices."""
    fake = FakePathways(broken=[6])
    references = topical(2, seed=1)
    problem = problem_of(fake, topical(2, topics=[5]), references, [[0, 1], [0, -1]])
    found = NGD(core=None).solve(problem)
    assert found.changed.tolist() == [False, True]
    assert torch.equal(found.values[0], problem.start[0])
    assert found.values.isfinite().all()


def test_the_mass_of_the_base_is_kept_in_a_real_moe():
    """What is found, put into the model with the base's mass, gives what was seen last."""
    with open_suffix() as suffix:
        tests, references = topical(2), topical(3, seed=1)
        problem = problem_of(suffix, tests, references)
        found = NGD(core=8).solve(problem)
        assert (found.losses[-1] < found.losses[0]).all()
        total = torch.zeros(2)
        for one, reading in zip(references, problem.reference.readings, strict=True):
            batch = suffix.batch([one.question] * 2, [reading.state] * 2)
            with torch.no_grad():
                total -= suffix.score(batch, Pathway(found.values, problem.mass, 8))[:, 0, 0] / 3
        torch.testing.assert_close(total, found.losses[-1], atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": -1}, {"lr": float("nan")}, {"optimizer": "sgd"}, {"core": 0}, {"keep": "first"},
        {"parameter": "multiply"}, {"trust": 0.0},
    ],
)  # fmt: skip
def test_an_impossible_setting_is_an_error(settings):
    """ConfigError names it."""
    with pytest.raises(ConfigError, match=next(iter(settings))):
        NGD(**settings)


def test_a_core_below_the_top_k_is_an_error():
    """It could not even hold the base's experts."""
    problem = problem_of(FakePathways(), topical(1), topical(1, seed=1))
    with pytest.raises(ConfigError, match="core=1"):
        NGD(core=1).solve(problem)
