from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from expertmix.errors import ConfigError
from expertmix.optimize.descent import NGD
from expertmix.optimize.global_delta import GlobalDelta

from .problems import only, problem_of
from .world import FakePathways, open_suffix, samples, topical


def test_the_shift_is_the_same_for_all_samples():
    """Whoever they are, and alone as in a batch."""
    problem = problem_of(FakePathways(decisions=2), topical(3), topical(6, seed=1))
    method = GlobalDelta()
    found = method.solve(problem)
    assert found.mode == "add"
    assert found.values.shape == (3, 1, 2, 6)
    assert found.changed.all()
    assert torch.equal(found.values, found.values[:1].expand_as(found.values))
    assert torch.equal(GlobalDelta().solve(only(problem, 2)).values[0], found.values[0])


def test_it_lowers_the_loss_of_the_references():
    """In a real MoE too."""
    with open_suffix(shift=True) as suffix:
        found = GlobalDelta(NGD(core=8)).solve(problem_of(suffix, samples(2), samples(6, seed=1)))
        assert (found.losses[1] < found.losses[0]).all()


def test_it_is_learned_once_per_model_and_references():
    """A second batch scores no reference; other references teach anew."""
    fake = FakePathways()
    problem = problem_of(fake, topical(2), topical(6, seed=1))
    method = GlobalDelta()
    method.solve(problem)
    count = fake.scorings
    method.solve(only(problem, 1))
    assert fake.scorings == count
    other = problem_of(fake, topical(2), topical(6, seed=2))
    assert not torch.equal(method.solve(other).values, method.solve(problem).values)


def test_a_draw_of_references_is_seeded():
    """The same seed learns the same, another one from others."""
    problem = problem_of(FakePathways(), topical(1), topical(12, seed=1))
    first, again, other = (
        GlobalDelta(most=4, seed=seed).solve(problem).values for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("change", [{"steps": 0}, {"references": 0}])
def test_without_steps_or_references_it_is_the_base(change):
    """The shift is 0, and nothing is changed."""
    problem = problem_of(FakePathways(), topical(2), topical(change.get("references", 3), seed=1),
                         [[], []])  # fmt: skip
    found = GlobalDelta(replace(NGD(), steps=change.get("steps", 10))).solve(problem)
    assert not found.changed.any()
    assert (found.values == 0).all()


@pytest.mark.parametrize("settings", [{"most": 0}, {"descent": NGD(trust=0.1)}])
def test_an_impossible_setting_is_an_error(settings):
    """ConfigError."""
    with pytest.raises(ConfigError):
        GlobalDelta(**settings)
