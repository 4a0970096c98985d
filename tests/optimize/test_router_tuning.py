from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from expertmix.core.pathway import Pathway, Question, TunableRouters
from expertmix.errors import ConfigError, UnsupportedModelError
from expertmix.optimize.neighbors import Finder
from expertmix.optimize.router_tuning import RouterTuning, changed_gates, follow, nearest_others
from expertmix.optimize.samples import Sample

from .problems import only, problem_of
from .world import FakePathways, model, open_suffix, samples, topical


def routers():
    return {name: one.clone() for name, one in model().named_parameters() if "gate" in name}


@pytest.mark.parametrize("scored", [False, True])
def test_pathways_of_a_real_moe_have_gates_that_route(scored):
    """`routed` is what a plain pass read, also of a short prompt; a gate's gradient reaches it."""
    short = Sample(Question((5,), ((6, 7), (8,))))
    with open_suffix(decisions=3, scored=scored) as suffix:
        assert isinstance(suffix, TunableRouters)
        problem = problem_of(suffix, [*samples(4), short], [])
        batch = suffix.batch(
            [one.question for one in problem.samples], [one.state for one in problem.readings]
        )
        want = torch.stack([one.logits for one in problem.readings])
        torch.testing.assert_close(suffix.routed(batch), want, atol=1e-5, rtol=0)
        gates = suffix.gates()
        with changed_gates(gates, [gate * 2 for gate in gates]):
            doubled = suffix.routed(batch)
            slopes = torch.autograd.grad(doubled.sum(), gates)
        assert all(slope.abs().sum() > 0 for slope in slopes)
        torch.testing.assert_close(doubled[:, :, 0], 2 * want[:, :, 0], atol=1e-5, rtol=0)
        torch.testing.assert_close(suffix.routed(batch), want, atol=1e-5, rtol=0)


def test_training_lowers_the_loss_of_the_references_and_restores_the_model():
    """References as test samples: their answers get likelier; weights are as before, bitwise."""
    before = routers()
    with open_suffix() as suffix:
        known = samples(6, seed=1)
        problem = problem_of(suffix, known, known)
        found = RouterTuning(steps=20, lr=0.01, smooth=0.0).solve(problem)
        assert found.changed.all()
        batch = suffix.batch(
            [one.question for one in known], [one.state for one in problem.readings],
            only=[one.gold for one in known],
        )  # fmt: skip
        with torch.no_grad():
            score = [
                suffix.score(batch, Pathway(values, problem.mass, 10)).sum((1, 2)).mean()
                for values in (problem.start, found.values)
            ]
        assert score[1] > score[0]
    assert all(torch.equal(one, before[name]) for name, one in routers().items())
    assert not any(
        "gate" in name and one.grad is not None for name, one in model().named_parameters()
    )


def test_the_pathway_is_the_decision_of_the_trained_routers():
    """Set at the decision token, it gives the log-probabilities that trained routers give.

    In a family whose weights sum to 1; elsewhere the base's mass is kept, theirs is not.
    """
    with open_suffix("mixtral") as suffix:
        tests = topical(3)  # options of one token: nothing but the decision token is routed anew
        problem = problem_of(suffix, tests, samples(6, seed=1))
        method = RouterTuning(steps=5, lr=0.05)
        found = method.solve(problem)
        batch = suffix.batch(
            [one.question for one in tests], [one.state for one in problem.readings]
        )
        with torch.no_grad():
            base = suffix.score(batch, None)
            got = suffix.score(batch, Pathway(found.values, problem.mass, 3))
            with changed_gates(suffix.gates(), method.memo.kept), torch.no_grad():
                want = suffix.score(batch, None)
        assert (want - base).abs().max() > 1e-3
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_smoothing_draws_pathways_of_neighbors_together():
    """With a large λ the spread of the references' pathways falls."""
    with open_suffix() as suffix:
        known = samples(6, seed=1)
        problem = problem_of(suffix, known, known)

        def spread(values):
            return float(values.softmax(-1).var(0).sum())

        rough = RouterTuning(steps=20, lr=0.01, smooth=0.0).solve(problem)
        smooth = RouterTuning(steps=20, lr=0.01, smooth=100.0).solve(problem)
        assert spread(smooth.values) < spread(rough.values)


def test_it_learns_once_and_alone_is_as_in_a_batch():
    """The second batch uses the gates of the first, whatever its samples."""
    with open_suffix() as suffix:
        problem = problem_of(suffix, samples(3), samples(4, seed=1))
        method = RouterTuning(steps=3)
        together = method.solve(problem)
        kept = method.memo.kept
        alone = method.solve(only(problem, 2))
        assert method.memo.kept is kept
        torch.testing.assert_close(alone.values[0], together.values[2], atol=1e-5, rtol=0)
        again = RouterTuning(steps=3).solve(problem)
        assert torch.equal(again.values, together.values)


@pytest.mark.parametrize(("steps", "references"), [(0, 4), (5, 0)])
def test_without_steps_or_references_it_is_the_base(steps, references):
    """Bit for bit."""
    with open_suffix() as suffix:
        problem = problem_of(suffix, samples(2), samples(4, seed=1)[:references], [[], []])
        found = RouterTuning(steps=steps).solve(problem)
        assert not found.changed.any()
        assert torch.equal(found.values, problem.start)


def test_a_start_follows_its_gate_through_the_routers_link():
    """Logits for a softmax, log-sigmoids for a sigmoid, up to a constant per token."""
    before, after = torch.randn(2, 3, 1, 2, 6, generator=torch.Generator().manual_seed(0))
    for link in (lambda logits: logits, functional.logsigmoid):
        start = link(before) - 1.5
        torch.testing.assert_close(follow(start, before, after), link(after) - 1.5)


def test_neighbors_are_the_most_similar_others():
    """Weights are similarities that sum to 1, negative ones 0; nobody is its own neighbor."""
    similarity = torch.tensor([[9.0, 0.9, -0.2], [0.9, 9.0, 0.3], [-0.2, -0.3, 9.0]])
    found, weights = nearest_others(similarity, 2)
    assert found.tolist() == [[1, 2], [0, 2], [0, 1]]
    torch.testing.assert_close(weights, torch.tensor([[1, 0], [0.75, 0.25], [0, 0]]))
    assert similarity[0, 0] == 9.0


def test_a_dimension_that_holds_all_variance_does_not_choose_the_neighbors():
    """Similarity is that of the search, whose dimensions are standardized."""
    with open_suffix() as suffix:
        problem = problem_of(suffix, samples(2), samples(6, seed=1))
        embeddings = problem.reference.embeddings
        loud = replace(problem.reference, embeddings=embeddings * (1 + 1e4 * torch.eye(32)[0]))
        other = replace(problem, finder=Finder(loud))
        found = [RouterTuning(steps=3, smooth=10.0).solve(one) for one in (problem, other)]
    torch.testing.assert_close(found[0].values, found[1].values)


def test_weights_come_back_when_training_fails():
    """An error inside leaves the gates as they were."""
    before = routers()
    with open_suffix() as suffix:
        gates = suffix.gates()
        with pytest.raises(ZeroDivisionError), changed_gates(gates, [gate * 0 for gate in gates]):
            raise ZeroDivisionError
    assert all(torch.equal(one, before[name]) for name, one in routers().items())


def test_pathways_without_gates_are_an_error():
    """It names the method."""
    problem = problem_of(FakePathways(), topical(1), topical(2, seed=1))
    with pytest.raises(UnsupportedModelError, match="router_tuning"):
        RouterTuning().solve(problem)


@pytest.mark.parametrize("settings", [{"steps": -1}, {"lr": -1.0}, {"rows": 0}, {"most": 0}])
def test_an_impossible_setting_is_an_error(settings):
    """ConfigError names it."""
    with pytest.raises(ConfigError, match=next(iter(settings))):
        replace(RouterTuning(), **settings)
