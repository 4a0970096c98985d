"""Laws of how a pathway's move is kept."""

from __future__ import annotations

import math

import pytest
import torch

import expertmix as em
from expertmix.study.optimize_moves import moved
from expertmix.testing import tiny_moe

from .test_remix import batch_of, sample


@pytest.fixture(scope="module")
def model():
    return tiny_moe("olmoe")


@pytest.fixture(scope="module")
def remixed(model):
    solved = [sample(number, gold) for number in range(12) for gold in range(3)]
    reference = em.references(model, solved, layers="last 2")
    return em.remix(model, [sample(30, None)], reference, "ngd steps=3")


def dense(pairs, experts: int) -> torch.Tensor:
    found = torch.zeros(experts)
    for expert, weight in pairs:
        found[expert] = weight
    return found


def test_it_holds_what_the_model_does(model, remixed):
    """Before and after are the weights that a recording shows at the last prompt token."""
    (outcome,) = remixed.outcomes
    top_k = max(info.top_k for info in remixed.sites)
    found = moved(outcome, top_k)
    inputs = batch_of([sample(30, None)])
    for when, edits in (("before", ()), ("after", (remixed.intervention(),))):
        with em.record(model, *edits) as trace:
            model(**inputs)
        site = remixed.sites[0]  # behind the first one the base's router reads something else
        shown = dense(found[when][0], site.num_experts)
        assert torch.allclose(trace[site.site].dense()[-1], shown, atol=1e-4)
    last = remixed.sites[-1]
    assert torch.allclose(
        trace[last.site].dense()[-1], dense(found["after"][1], last.num_experts), atol=1e-4
    )


def test_divergence_is_of_the_whole_distribution(remixed):
    """The sum of q log(q / p) over all experts, in float64; an expert outside the core adds 0."""
    (outcome,) = remixed.outcomes
    new, old = (values[0].double().softmax(-1) for values in (outcome.values, outcome.start))
    for site, kl in enumerate(moved(outcome, 2)["kl"]):
        parts = [
            q * math.log(q / p)
            for q, p in zip(new[site].tolist(), old[site].tolist(), strict=True) if q > 0
        ]  # fmt: skip
        assert kl == pytest.approx(sum(parts), abs=2e-6)
        assert kl > 0


def test_what_is_left_alone_has_no_move(model):
    """Nothing is kept of it."""
    solved = [sample(number, gold) for number in range(12) for gold in range(3)]
    reference = em.references(model, solved, layers="last 2")
    (outcome,) = em.remix(model, [sample(30, None)], reference, "ngd steps=0").outcomes
    assert moved(outcome, 2) is None
