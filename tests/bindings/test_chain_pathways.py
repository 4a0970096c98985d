"""Pathways through the iterations of chains of experts, exactly and by full passes."""

from __future__ import annotations

import pytest
import torch
from chain_cases import CASES, made
from pathway_cases import (
    EXACT,
    edits,
    hooks,
    pathway,
    plain,
    questions,
    read_and_batch,
    suffix_of,
    whole_of,
    worst,
)

import expertmix as em
from expertmix.bindings.pathways import open_pathways
from expertmix.errors import ConfigError, UnsupportedRuntimeError

ASKED = questions()
WAYS = (
    *CASES,
    {"residual": "outer", "norm": "once", "attention": "olmoe"},
    {"residual": "init", "halting_threshold": 0.3},
)
WIDTHS = (2, 8)


@pytest.fixture(params=WAYS, ids=str)
def model(request):
    return made(num_hidden_layers=3, **request.param)


def test_the_last_layers_are_all_their_iterations(model):
    """`last 2` opens the exact suffix, over every iteration of two layers; nothing stays behind."""
    wanted = [info for info in em.sites(model) if not info.site.name.startswith("model.layers.0.")]
    with open_pathways(model, layers="last 2", decisions=2, scored=True) as pathways:
        assert pathways.exact
        assert pathways.notice is None
        assert list(pathways.sites) == wanted
    assert hooks(model) == 0


@pytest.mark.parametrize("last", [1, 2, 4])
def test_a_pathway_is_what_its_interventions_are(model, last):
    """From any iteration on: equal to plain passes under `Reweight`, K wide and E wide.

    So what iteration 1 reads has iteration 0's new decision in it.
    """
    suffix = suffix_of(model, last, decisions=2, scored=True)
    base = plain(model, ASKED)
    with suffix.running():
        batch = read_and_batch(suffix, ASKED)
        assert worst(suffix.score(batch, None), base) < EXACT
        for width in WIDTHS * 2:
            way = pathway(suffix.sites, width, depth=2)
            wanted = plain(model, ASKED, edits(ASKED, suffix.sites, way, 2, True))
            assert worst(suffix.score(batch, way).detach(), wanted) < EXACT
            assert worst(base, wanted) > 1e-3


@pytest.mark.parametrize("gating", ["independent", "shared"])
def test_a_shift_is_what_its_intervention_is(gating):
    """Mode `add`: each iteration's logits are shifted by its own values."""
    model = made(num_hidden_layers=3, gating=gating)
    suffix = suffix_of(model, 3, decisions=3, scored=True, shift=True)
    with suffix.running():
        batch = read_and_batch(suffix, ASKED)
        way = pathway(suffix.sites, 2, depth=3, mode="add")
        wanted = plain(model, ASKED, edits(ASKED, suffix.sites, way, 3, True))
        assert worst(suffix.score(batch, way).detach(), wanted) < EXACT


@pytest.mark.parametrize("width", WIDTHS)
def test_gradients_are_those_of_full_passes(model, width):
    """d score / d values, at every iteration, is the same through the suffix and full passes."""
    way = pathway(suffix_of(model, 4).sites, width, depth=2)
    found = []
    for pathways in (
        suffix_of(model, 4, decisions=2, scored=True),
        whole_of(model, 4, decisions=2, scored=True),
    ):
        with pathways.running():
            scores = pathways.score(read_and_batch(pathways, ASKED), way)
            found.append((scores.detach(), *torch.autograd.grad(scores.sum(), way.values)))
    (ours, slope), (wanted, wanted_slope) = found
    assert float((ours - wanted).abs().max()) < EXACT
    assert float((slope - wanted_slope).abs().max()) < EXACT
    assert (slope.abs().amax((0, 1, 3)) > 1e-5).all()


@pytest.mark.parametrize(("gating", "count"), [("independent", 4), ("shared", 2), ("fixed", 2)])
def test_a_router_is_tuned_once(gating, count):
    """A router that several iterations ask is one weight to train, and has logits in each."""
    model = made(num_hidden_layers=3, gating=gating)
    suffix = suffix_of(model, 4)
    with suffix.running():
        assert len(suffix.gates()) == count
        logits = suffix.routed(read_and_batch(suffix, ASKED))
        readings = torch.stack([one.logits for one in suffix.read(ASKED)])
    torch.testing.assert_close(logits, readings, rtol=1e-5, atol=1e-6)


def test_kept_decisions_have_no_logits_to_shift():
    """With fixed gating, a shift at a later iteration is refused; first iterations can be named."""
    model = made(num_hidden_layers=3, gating="fixed")
    with (
        pytest.raises(ConfigError, match=r"\*#0"),
        open_pathways(model, layers="last 2", shift=True),
    ):
        pass
    with open_pathways(model, layers="*#0", shift=True) as pathways:
        assert pathways.exact
        assert {info.site.step for info in pathways.sites} == {0}


def test_an_iteration_that_nobody_reached_has_no_decision():
    """Where all tokens have halted before a critical iteration, reading says so."""
    model = made(halting_threshold=1e9)
    with (
        pytest.raises(UnsupportedRuntimeError, match="halting_threshold"),
        open_pathways(model, layers="all"),
    ):
        pass
    assert hooks(model) == 0


@pytest.mark.parametrize(
    "method", ["ngd steps=3", "kernel_regression", "global_delta", "router_tuning steps=3"]
)
def test_remixing_a_chain(method):
    """References of a chain re-mix it; under its intervention, the model scores as it says."""
    model = made(num_hidden_layers=3, gating="shared")
    options = ((30, 31), (32,), (33, 34))
    solved = [
        em.Sample(em.Question((number + 40, 5, number + 7), options), gold)
        for number in range(8)
        for gold in range(3)
    ]
    asked = [em.Sample(em.Question((number + 20, 9, number + 7), options), 0) for number in (1, 2)]
    reference = em.references(model, solved, layers="last 2")
    assert [info.site.step for info in reference.meta.sites] == [0, 1, 0, 1]
    better = em.remix(model, asked, reference, method)
    for number, outcome in enumerate(better.outcomes):
        question = outcome.sample.question
        ids = torch.tensor([(*question.prompt, *one, 0)[:5] for one in options])
        with torch.no_grad(), em.record(model, better.intervention([number], options=True)):
            logprobs = model(ids).logits.log_softmax(-1)
        found = [
            sum(logprobs[row, 2 + n, token] for n, token in enumerate(option))
            for row, option in enumerate(options)
        ]
        assert outcome.changed
        torch.testing.assert_close(torch.stack(found), outcome.hard, rtol=0, atol=EXACT)
