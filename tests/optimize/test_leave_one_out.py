from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from expertmix.errors import ConfigError
from expertmix.optimize.descent import NGD
from expertmix.optimize.leave_one_out import LeaveOneOut

from .problems import only, problem_of, reordered
from .world import FakePathways, topical

SLOW = NGD(steps=8, lr=0.3, final_lr=0.3, core=None)


def contradicting(count=3):
    """Neighbors that want different targets, seen from a start between them."""
    fake = FakePathways(dtype=torch.float64, experts=6)
    problem = problem_of(fake, topical(1, topics=[5]), topical(count, seed=1))
    targets = torch.stack([fake.target(topic, 20) for topic in (5, 6, 7)])
    return replace(problem, start=targets.mean(0)[None, None].log())


def test_neighbors_that_contradict_each_other_stop_it_at_the_base():
    """What helps two hurts the third from the first step on."""
    problem = contradicting()
    found = LeaveOneOut(SLOW).solve(problem)
    assert found.notes["step"].tolist() == [0]
    assert not found.changed.any()
    assert torch.equal(found.values, problem.start)


def test_neighbors_that_agree_let_it_go_on():
    """All of one topic: the last step is the best, and it is the one of NGD."""
    problem = problem_of(FakePathways(), topical(2, topics=[5]), topical(3, topics=[5], seed=1))
    slow = replace(SLOW, lr=0.1, final_lr=0.1)
    found = LeaveOneOut(slow).solve(problem)
    assert found.notes["step"].tolist() == [8, 8]
    assert torch.equal(found.values, slow.solve(problem).values)


def test_the_held_out_loss_is_that_of_a_descent_on_the_others():
    """Fold by fold, as a loop of NGD without that neighbor."""
    problem = problem_of(FakePathways(), topical(1), topical(3, seed=1), weights=[[0.5, 0.2, 0.3]])
    held = LeaveOneOut(SLOW).solve(problem).notes["held_out"][0]
    want = torch.zeros(9)
    for out, weight in enumerate((0.5, 0.2, 0.3)):
        rest = [slot for slot in range(3) if slot != out]
        surrogate = SLOW.surrogate(reordered(problem, [out]))
        trail = SLOW.trail(SLOW.surrogate(reordered(problem, rest)), problem)
        want += weight * torch.stack([surrogate.losses(values)[0] for values in trail.values])
    torch.testing.assert_close(held, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("near", [[[0, -1, -1]], [[-1, -1, -1]], [[]]])
def test_one_neighbor_or_none_keeps_the_base(near):
    """Nothing can be held out."""
    problem = problem_of(FakePathways(), topical(1), topical(3, seed=1), near)
    found = LeaveOneOut(SLOW).solve(problem)
    assert not found.changed.any()
    assert torch.equal(found.values, problem.start)


def test_samples_choose_for_themselves():
    """Together as alone, in steps, rates and values."""
    near = [[0, 3, 6], [0, 1, 2], [4, 1, -1]]
    problem = problem_of(FakePathways(), topical(3), topical(9, seed=1), near)
    method = LeaveOneOut(SLOW, rates=(0.3, 1.0, 3.0))
    together = method.solve(problem)
    assert len(together.notes["rate"].unique()) > 1
    for row in range(3):
        alone = method.solve(only(problem, row))
        torch.testing.assert_close(alone.values[0], together.values[row])
        torch.testing.assert_close(alone.losses[:, 0], together.losses[:, row])
        assert alone.notes["step"] == together.notes["step"][row]
        assert alone.notes["rate"] == together.notes["rate"][row]


@pytest.mark.parametrize("rates", [(), (1.0, 0.0)])
def test_rates_must_be_above_zero(rates):
    """ConfigError names them."""
    with pytest.raises(ConfigError, match="rates"):
        LeaveOneOut(rates=rates)
