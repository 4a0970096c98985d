from __future__ import annotations

import pytest
import torch

from expertmix.errors import ConfigError
from expertmix.optimize.adaptive import Adaptive, promise
from expertmix.optimize.descent import NGD

from .problems import problem_of
from .world import FakePathways, topical

DENSE = NGD(core=None)


def world():
    return problem_of(FakePathways(layers=4), topical(3), topical(3, seed=1))


@pytest.mark.parametrize("sites", [1, 2])
def test_only_the_best_sites_move(sites):
    """So many per sample, those with the largest attribution; the others keep the start."""
    problem = world()
    found = Adaptive(DENSE, sites=sites).solve(problem)
    moved = (found.values != problem.start).any(-1).any(1)
    assert (moved.sum(1) == sites).all()
    assert torch.equal(moved, found.notes["adapted"])
    shares = found.notes["attribution"]
    torch.testing.assert_close(shares.sum(1), torch.ones(3))
    assert (shares.where(moved, torch.inf).amin(1) >= shares.where(~moved, 0).amax(1)).all()


def test_all_sites_are_ngd():
    """With room for every site nothing differs."""
    problem = world()
    found = Adaptive(DENSE, sites=4).solve(problem)
    assert torch.equal(found.values, DENSE.solve(problem).values)


def test_a_share_chooses_another_number_for_each_sample():
    """Sites whose share is at least this."""
    problem = world()
    found = Adaptive(DENSE, sites=None, share=0.25).solve(problem)
    assert torch.equal(found.notes["adapted"], found.notes["attribution"] >= 0.25)


@pytest.mark.parametrize("optimizer", ["gd", "adam"])
def test_the_promise_is_the_first_order_gain_of_a_step(optimizer):
    """Σ g² or Σ |g| of a site, as a share."""
    gradient = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    gain = torch.stack(
        [
            (gradient[:, :, site].abs() if optimizer == "adam" else gradient[:, :, site] ** 2).sum(
                (1, 2)
            )
            for site in range(4)
        ],
        1,
    )
    torch.testing.assert_close(promise(gradient, optimizer), gain / gain.sum(1, keepdim=True))


@pytest.mark.parametrize(
    "settings", [{"sites": None}, {"sites": 1, "share": 0.5}, {"sites": 0},
                 {"sites": None, "share": 2.0}],
)  # fmt: skip
def test_either_sites_or_a_share(settings):
    """Both, neither or an impossible one are errors."""
    with pytest.raises(ConfigError):
        Adaptive(**settings)
