"""Whose routing is changed at all."""

from __future__ import annotations

import pytest
import torch

from expertmix.errors import ConfigError
from expertmix.optimize.descent import NGD
from expertmix.optimize.gate import Gate, Keeper, agreement, margin_of, own_distance
from expertmix.optimize.neighbors import Finder, Neighbors, find
from expertmix.optimize.reference import ReferenceSet
from expertmix.optimize.remix import remix

from .world import FakePathways, topical


@pytest.fixture(scope="module")
def world():
    """The analytic world, with references of two topics."""
    pathways = FakePathways(pull=0.6)
    return pathways, ReferenceSet.build(pathways, topical(40, topics=(5, 6)))


def reasons(world, gate, tests, neighbors=Neighbors(max_similarity=None)):  # noqa: B008
    """Why outcomes are not changed."""
    pathways, reference = world
    found = remix(pathways, tests, reference, NGD(steps=2), neighbors=neighbors, gate=gate)
    for one in found.outcomes:
        assert one.changed == (not one.reason)
        assert one.changed or torch.equal(one.hard, one.base)
    return found.outcomes


def test_without_conditions_all_pass(world):
    """The default gate refuses nobody."""
    assert not any(one.reason for one in reasons(world, Gate(), topical(6, seed=2)))


def test_only_fragile_samples_are_adapted(world):
    """Refused are those whose margin is above the limit, and the reason has both numbers."""
    tests = topical(12, seed=2)
    margins = sorted(margin_of(one.base) for one in reasons(world, Gate(), tests))
    limit = margins[5]
    for one in reasons(world, Gate(max_margin=limit), tests):
        fragile = margin_of(one.base) <= limit
        assert one.changed == fragile
        assert fragile or one.reason.startswith("not fragile: margin")


def test_samples_that_are_too_far_are_refused(world):
    """A topic that no reference has is farther than references are from each other."""
    gate = Gate(max_distance=0.95)
    near = reasons(world, gate, topical(8, seed=2, topics=(5, 6)))
    far = reasons(world, gate, topical(8, seed=2, topics=(9, 11)))
    assert sum(one.changed for one in near) > sum(one.changed for one in far)
    assert any(one.reason.startswith("too far: the nearest neighbor is at") for one in far)
    alone = reasons(world, gate, topical(2, seed=2), Neighbors(0))
    assert {one.reason for one in alone} == {"no neighbors"}


def test_own_distances_are_those_of_a_loop(world):
    """The quantile of each reference's distance to the nearest other one."""
    _, reference = world
    settings = Neighbors(max_similarity=None)
    finder = Finder(reference, settings)
    own = reference.embeddings.double() - reference.embeddings.double().mean(0)
    own = own / own.std(0, correction=0)
    own = own / own.norm(dim=1, keepdim=True)
    far = torch.cdist(own, own) + 9 * torch.eye(len(own))
    nearest = far.min(1).values.sort().values
    for quantile in (0.1, 0.5, 1.0):
        expected = nearest[int(quantile * (len(own) - 1))]
        assert own_distance(finder, quantile) == pytest.approx(float(expected), abs=1e-5)
    everyone = Finder(reference, Neighbors(max_similarity=-1.0))
    assert own_distance(everyone, 0.5) == float("inf")


def test_neighbors_that_disagree_are_refused(world):
    """The mean pairwise cosine decides; with one neighbor there is nobody to disagree."""
    tests = topical(10, seed=2, topics=(5, 6))
    strict = reasons(world, Gate(min_agreement=1.0), tests)
    assert all("neighbors disagree: mean cosine" in one.reason for one in strict)
    assert all(one.changed for one in reasons(world, Gate(min_agreement=-1.0), tests))
    single = Neighbors(1, max_similarity=None)
    assert all(one.changed for one in reasons(world, Gate(min_agreement=1.0), tests, single))


def test_agreement_is_the_mean_cosine_of_pairs():
    """As a loop over pairs has it; absent neighbors have no say."""
    vectors = torch.randn(5, 4, 7)
    present = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 1], [1, 0, 0, 1], [1, 0, 0, 0], [0] * 4]).bool()
    for row, found in enumerate(agreement(vectors, present).tolist()):
        mine = vectors[row][present[row]]
        pairs = [
            float(torch.cosine_similarity(mine[a], mine[b], dim=0))
            for a in range(len(mine)) for b in range(a)
        ]  # fmt: skip
        assert found == pytest.approx(sum(pairs) / len(pairs) if pairs else 1.0, abs=1e-5)


def test_a_sample_with_one_option_has_no_margin(world):
    """Nothing can be said of its fragility, so it passes."""
    _, reference = world
    found = find(reference.embeddings[:1] + 0.1, reference)
    keeper = Keeper(Gate(max_margin=0.0), Finder(reference))
    assert keeper.reasons([torch.tensor([-3.0])], found) == [""]
    assert keeper.reasons([torch.tensor([-3.0, -4.0])], found)[0].startswith("not fragile")


def test_impossible_gates_are_refused():
    """Typed errors that name the setting."""
    for settings in ({"max_margin": -1.0}, {"max_distance": 0.0}, {"min_agreement": 2.0}):
        with pytest.raises(ConfigError, match=next(iter(settings))):
            Gate(**settings)
