"""Full passes fulfil the same protocol, also for routed adapters."""

from __future__ import annotations

import pytest
import torch
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
from expertmix.bindings.critical import critical_sites
from expertmix.bindings.record import bind
from expertmix.bindings.whole import Whole
from expertmix.core.pathway import Pathway, Question
from expertmix.errors import UnsupportedModelError, UnsupportedRuntimeError
from expertmix.testing import NUM_EXPERTS, TOP_K, tiny_adapters, tiny_lm, tiny_moe

ASKED = questions()
NAMES = ["law", "medicine", "music", "physics"]
OTHERS = ("jamba", "deepseek_v32", "lfm2_moe", "longcat_flash", "gemma4_text")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return tiny_adapters(tmp_path_factory.mktemp("adapters"), tiny_lm(), NAMES)


@pytest.fixture
def composed(library):
    return em.compose(tiny_lm(), library, {"kind": "spectr", "top_k": 2, "weights": "softmax"})


def opened(model, layers="last 2", **settings) -> Whole:
    routed = bind(model)
    return Whole(routed, critical_sites(tuple(routed.sites), layers), **settings)


@pytest.mark.parametrize("family", OTHERS)
def test_it_is_the_plain_pass(family):
    """With and without a pathway, where the suffix does not fit: one plain pass per option."""
    # an index of few keys breaks ties by the length of a row: let it hold all of them
    model = tiny_moe(family, **({"index_topk": 64} if family == "deepseek_v32" else {}))
    whole = whole_of(model, decisions=2, scored=True)
    experts, top_k = whole.sites[0].num_experts, whole.sites[0].top_k
    with whole.running():
        readings = whole.read(ASKED)
        batch = whole.batch(ASKED, [reading.state for reading in readings])
        assert worst([reading.logprobs for reading in readings], plain(model, ASKED)) < EXACT
        for width in (top_k, experts):
            way = pathway(whole.sites, width, depth=2)
            wanted = plain(model, ASKED, edits(ASKED, whole.sites, way, 2, True))
            assert worst(whole.score(batch, way).detach(), wanted) < EXACT
    assert hooks(model) == 0


def test_only_some_options():
    """`only` gives the scores of one option of each question."""
    whole, chosen = whole_of(tiny_moe("jamba")), [1, 0, 2]
    way = pathway(whole.sites, NUM_EXPERTS)
    with whole.running(), torch.no_grad():
        every = whole.score(read_and_batch(whole, ASKED), way)
        scores = whole.score(read_and_batch(whole, ASKED, only=chosen), way)
    for row, option in enumerate(chosen):
        length = len(ASKED[row].options[option])
        assert worst(scores[row : row + 1], [[every[row, option, :length]]]) < EXACT


def test_readings_are_those_of_the_suffix():
    """Both ways to read a model give the same logits, decisions and hidden states."""
    model = tiny_moe("deepseek_v3")
    suffix, whole = suffix_of(model, decisions=3), whole_of(model, decisions=3)
    with suffix.running():
        exact = suffix.read(ASKED)
    with whole.running():
        full = whole.read(ASKED)
    for one, other in zip(exact, full, strict=True):
        for name in ("logprobs", "last", "mean", "logits", "weights"):
            torch.testing.assert_close(getattr(one, name), getattr(other, name))
        assert torch.equal(one.indices, other.indices)


@pytest.mark.parametrize("kind", ["spectr", "pooled", "arrow", "uniform"])
def test_one_adapter_alone(library, kind):
    """A one-hot pathway over a whole text, at all modules, is a model with that adapter only."""
    model = em.compose(
        tiny_lm(), library, {"kind": kind, "top_k": 2} if kind != "uniform" else kind
    )
    prompt = ASKED[0].prompt
    asked = [Question(prompt, ASKED[0].options)]
    whole = opened(model, "all", decisions=len(prompt), scored=True)
    number = NAMES.index("music")
    values = torch.full((1, 1, len(whole.sites), len(NAMES)), float("-inf"))
    values[..., number] = 0
    with whole.running(), torch.no_grad():
        way = Pathway(values, torch.ones(1, 1, len(whole.sites)), 1)
        scores = whole.score(read_and_batch(whole, asked), way)
    shelf = em.Composed.of(model).plan.shelf
    for name in NAMES:
        shelf = shelf if name == "music" else shelf.minus(name)
    alone = em.compose(tiny_lm(), shelf, "uniform")
    assert worst(scores, plain(alone, asked)) < EXACT
    assert worst(scores, plain(model, asked)) > 1e-3


def test_a_pathway_over_adapters_is_what_its_interventions_are(composed):
    """Modes `set` and `add` at the last prompt token, K wide and E wide; gradients flow."""
    whole = opened(composed, shift=True)
    with whole.running():
        batch = read_and_batch(whole, ASKED)
        for mode, width in (("set", 2), ("set", 4), ("add", 2)):
            way = pathway(whole.sites, width, mode=mode)
            scores = whole.score(batch, way)
            (gradient,) = torch.autograd.grad(scores.sum(), way.values)
            wanted = plain(composed, ASKED, edits(ASKED, whole.sites, way, 1, False))
            assert worst(scores.detach(), wanted) < EXACT
            assert float(gradient.abs().max()) > 0


def test_readings_of_adapters_are_the_routers_own(composed):
    """Logits are the router's scores: its choice is their top K, its weights their softmax."""
    whole = opened(composed)
    with whole.running():
        readings = whole.read(ASKED)
    assert worst([reading.logprobs for reading in readings], plain(composed, ASKED)) < EXACT
    for reading in readings:
        best = reading.logits.topk(2)
        assert torch.equal(best.indices, reading.indices)
        assert reading.state == {}


def test_a_base_without_words_is_refused():
    """Pathways need log-probabilities: a model without a head says so."""
    model = tiny_moe("olmoe").model
    routed = bind(model)
    with pytest.raises(UnsupportedModelError, match="language-model head"):
        Whole(routed, tuple(routed.sites))


def test_a_loop_says_so():
    """A site that runs twice in a pass has no one pathway."""
    whole = whole_of(tiny_moe("inkling2_loop_text"), last=4)
    with whole.running(), pytest.raises(UnsupportedRuntimeError, match="ran twice"):
        whole.read(ASKED)


def test_top_k_is_what_experts_get():
    """An E-wide pathway widens decision tokens only: other tokens keep K experts a row."""
    model = tiny_moe("olmoe")
    whole, widths = whole_of(model), set()
    with whole.running():
        batch = read_and_batch(whole, ASKED)
        experts = whole.routed.blocks[-1].experts
        hook = experts.register_forward_pre_hook(lambda _, args: widths.add(args[1].shape[1]))
        whole.score(batch, pathway(whole.sites, NUM_EXPERTS))
        hook.remove()
    assert widths == {TOP_K}
