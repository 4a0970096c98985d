from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from expertmix.errors import ConfigError
from expertmix.optimize.mode_finding import ModeFinding, median_distance
from expertmix.optimize.neighbors import Neighbors
from expertmix.optimize.reference import ReferenceSet
from expertmix.optimize.regression import Search
from expertmix.optimize.remix import remix

from .problems import problem_of
from .world import FakePathways, topical


def planted(spread: float):
    """Twenty references around a planted mode, all of one topic; and the mode."""
    fake = FakePathways(pull=1.0)
    everyone = Neighbors(max_similarity=None)
    problem = problem_of(
        fake, topical(2, topics=[5]), topical(20, topics=[5], seed=1), settings=everyone
    )
    mode = fake.target(5, 20).log()
    noise = torch.randn(10, 1, 2, 6, generator=torch.Generator().manual_seed(0))
    problem.reference.start[:] = mode + spread * torch.cat([noise, -noise])
    return problem, mode


def test_a_mean_shift_stays_at_a_planted_mode():
    """References alike on both sides of a mode: who starts there moves by less than 1e-3."""
    problem, mode = planted(0.05)
    problem.start[:] = mode
    found = ModeFinding(Search(alpha=0.0)).solve(problem)
    torch.testing.assert_close(found.values.softmax(-1), mode.softmax(-1).expand(2, 1, 2, 6),
                               atol=1e-3, rtol=0)  # fmt: skip


def test_a_mean_shift_climbs_to_a_planted_mode():
    """From afar, with α = 0, to 1e-3."""
    problem, mode = planted(0.05)
    found = ModeFinding(Search(alpha=0.0), bandwidth=0.3).solve(
        replace(problem, start=problem.start + 1.0 * torch.randn(2, 1, 2, 6))
    )
    torch.testing.assert_close(found.values.softmax(-1), mode.softmax(-1).expand(2, 1, 2, 6),
                               atol=1e-3, rtol=0)  # fmt: skip


def test_one_step_is_the_papers_formula():
    """p ← Σ K(p, pᵢ) pᵢ / Σ K(p, pᵢ), as a loop over references."""
    problem, _ = planted(1.0)
    found = ModeFinding(Search(alpha=0.0), steps=1, bandwidth=0.4).solve(problem)
    own = problem.reference.start.softmax(-1)
    for row in range(2):
        at, total, weight = problem.start[row].softmax(-1), 0.0, 0.0
        for other in own:
            kernel = torch.exp(-(at - other).square().sum() / (2 * 0.4**2))
            total, weight = total + kernel * other, weight + kernel
        torch.testing.assert_close(found.values[row].softmax(-1), total / weight)


def test_the_bandwidth_is_the_median_distance():
    """Of all pairs that differ."""
    points = torch.tensor([[0.0], [1.0], [3.0], [3.0]])
    assert median_distance(points) == 2.0  # 1, 3, 3, 2, 2 between those that differ
    assert median_distance(points[2:]) == 0.0


def test_among_one_is_the_nearest_reference():
    """A shift that sees one reference ends at it."""
    problem, _ = planted(1.0)
    found = ModeFinding(Search(alpha=0.0), steps=3, among=1).solve(problem)
    own = problem.reference.start.softmax(-1).flatten(1)
    nearest = torch.cdist(problem.start.softmax(-1).flatten(1), own).argmin(1)
    torch.testing.assert_close(found.values.softmax(-1).flatten(1), own[nearest])


def test_near_duplicates_of_a_sample_are_not_seen():
    """A reference with the sample's own embedding is left out; with none left, the base stays."""
    tests = topical(2)
    problem = problem_of(FakePathways(), tests, tests)
    found = ModeFinding(Search(alpha=0.0), bandwidth=1.0).solve(problem)
    other = problem.start.flip(0).softmax(-1)
    torch.testing.assert_close(found.values.softmax(-1), other)
    alone = problem_of(FakePathways(), tests, tests, settings=Neighbors(max_similarity=-2.0))
    found = ModeFinding(Search(alpha=0.0)).solve(alone)
    assert not found.changed.any()
    assert torch.equal(found.values, problem.start)


def test_what_neighbors_leave_out_the_shift_leaves_out():
    """A reference with the sample's text, however its embedding lies; the reason is told."""
    text = "one two three four five six seven eight nine"
    tests = [replace(one, text=text) for one in topical(2)]
    known = [replace(one, text=text) for one in topical(4, seed=1)]
    pathways = FakePathways()
    reference = ReferenceSet.build(FakePathways(pull=1.0), known)
    reference = replace(reference, meta=replace(reference.meta, fingerprint=pathways.fingerprint()))
    for one in remix(pathways, tests, reference, ModeFinding()).outcomes:
        assert (one.changed, one.reason) == (False, "no neighbors")
    every = Neighbors(ngram=None, max_similarity=None)
    for one in remix(pathways, tests, reference, ModeFinding(), neighbors=every).outcomes:
        assert one.reason != "no neighbors"


@pytest.mark.parametrize("settings", [{"steps": -1}, {"bandwidth": 0.0}, {"among": 0}])
def test_an_impossible_setting_is_an_error(settings):
    """ConfigError names it."""
    with pytest.raises(ConfigError, match=next(iter(settings))):
        ModeFinding(**settings)
