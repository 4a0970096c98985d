"""Exact suffix evaluation gives what full passes give, values and gradients."""

from __future__ import annotations

import pytest
import torch
from pathway_cases import (
    EXACT,
    FAMILIES,
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
from safetensors.torch import load, save

from expertmix.core.pathway import Pathway, Question
from expertmix.errors import ConfigError, UnsupportedModelError
from expertmix.testing import NUM_EXPERTS, TOP_K, tiny_moe

ASKED = questions()
WIDTHS = [TOP_K, NUM_EXPERTS]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return tiny_moe(request.param)


@pytest.fixture(scope="module")
def olmoe():
    return tiny_moe("olmoe")


def test_read_and_score_are_the_plain_pass(model):
    """Without a pathway, both give the log-probabilities of one plain pass per option."""
    suffix, wanted = suffix_of(model), plain(model, ASKED)
    with suffix.running():
        readings = suffix.read(ASKED)
        batch = suffix.batch(ASKED, [reading.state for reading in readings])
        assert worst([reading.logprobs for reading in readings], wanted) < EXACT
        assert worst(suffix.score(batch, None), wanted) < EXACT


@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("decisions", [1, 3])
def test_a_pathway_is_what_its_interventions_are(model, decisions, scored):
    """Mode `set`: equal to plain passes under `Reweight` of the weights, K wide and E wide."""
    suffix = suffix_of(model, decisions=decisions, scored=scored)
    base = plain(model, ASKED)
    with suffix.running():
        batch = read_and_batch(suffix, ASKED)
        for width in WIDTHS:
            for depth in {1, decisions}:
                way = pathway(suffix.sites, width, depth=depth)
                scores = suffix.score(batch, way).detach()
                wanted = plain(model, ASKED, edits(ASKED, suffix.sites, way, decisions, scored))
                assert worst(scores, wanted) < EXACT
                assert worst(scores, base) > 1e-3


def test_a_shift_is_what_its_intervention_is(model):
    """Mode `add`: equal to plain passes under `Reweight` of the logits; zero changes nothing."""
    suffix = suffix_of(model, decisions=3, scored=True, shift=True)
    with suffix.running():
        batch = read_and_batch(suffix, ASKED)
        way = pathway(suffix.sites, TOP_K, depth=3, mode="add")
        wanted = plain(model, ASKED, edits(ASKED, suffix.sites, way, 3, True))
        assert worst(suffix.score(batch, way).detach(), wanted) < EXACT
        none = Pathway(torch.zeros_like(way.values), way.mass, TOP_K, "add")
        assert worst(suffix.score(batch, none), plain(model, ASKED)) < EXACT


@pytest.mark.parametrize(("mode", "width"), [("set", 3), ("set", 10), ("add", 3), ("add", 10)])
def test_gradients_are_those_of_full_passes(model, mode, width):
    """d score / d values is the same through the suffix and through full passes."""
    way = pathway(suffix_of(model).sites, width, depth=2, mode=mode)
    found = []
    for pathways in (
        suffix_of(model, decisions=2, scored=True, shift=True),
        whole_of(model, decisions=2, scored=True, shift=True),
    ):
        with pathways.running():
            scores = pathways.score(read_and_batch(pathways, ASKED), way)
            found.append((scores.detach(), *torch.autograd.grad(scores.sum(), way.values)))
    assert float((found[0][0] - found[1][0]).abs().max()) < EXACT
    assert float((found[0][1] - found[1][1]).abs().max()) < EXACT
    assert float(found[0][1].abs().max()) > 1e-4


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen2_moe"])
def test_gradients_are_slopes(family):
    """Along the gradient, the scores rise by what the gradient says (float64, all experts called).

    Norms and softmaxes of these families round to float32, so the step is large and 1 % is allowed.
    """
    model = tiny_moe(family).double()
    model.set_experts_implementation("eager")
    suffix = suffix_of(model)
    with suffix.running():
        batch = read_and_batch(suffix, ASKED)
        way = pathway(suffix.sites, NUM_EXPERTS)
        mass = way.mass.double() * 4

        def total(values):
            return suffix.score(batch, Pathway(values, mass, NUM_EXPERTS)).double().sum()

        values = way.values.detach().double().requires_grad_()
        (gradient,) = torch.autograd.grad(total(values), values)
        step = 0.05 * gradient / gradient.norm()
        with torch.no_grad():
            rise = (total(values + step) - total(values - step)) / 2
    assert float(rise) == pytest.approx(float((gradient * step).sum()), rel=0.01)


def test_a_batch_changes_nothing(model):
    """A question scores alone as it does in a batch, whatever is padded around it."""
    suffix = suffix_of(model, decisions=2, scored=True)
    way = pathway(suffix.sites, NUM_EXPERTS, depth=2)
    with suffix.running(), torch.no_grad():
        together = suffix.score(read_and_batch(suffix, ASKED), way)
        for row, one in enumerate(ASKED):
            mine = Pathway(way.values[row : row + 1], way.mass[row : row + 1], way.width)
            alone = suffix.score(read_and_batch(suffix, [one]), mine)[0]
            assert worst([together[row]], [list(alone[:, : alone.shape[1]])]) < EXACT
            assert not together[row, len(one.options) :].any()


def test_options_keep_their_scores_in_any_order(olmoe):
    """Permuting options permutes results, and changes nothing else."""
    suffix = suffix_of(olmoe)
    turned = [Question(one.prompt, one.options[::-1]) for one in ASKED]
    way = pathway(suffix.sites, NUM_EXPERTS)
    with suffix.running(), torch.no_grad():
        there = suffix.score(read_and_batch(suffix, ASKED), way)
        back = suffix.score(read_and_batch(suffix, turned), way)
    wanted = [[there[row, n] for n in range(len(one.options))] for row, one in enumerate(ASKED)]
    assert worst(back, [options[::-1] for options in wanted]) < EXACT


def test_the_recorded_pathway_is_the_base(olmoe):
    """A pathway of the recorded experts and weights scores as no pathway does."""
    suffix = suffix_of(olmoe, decisions=3)
    with suffix.running(), torch.no_grad():
        readings = suffix.read(ASKED)
        batch = suffix.batch(ASKED, [reading.state for reading in readings])
        indices = torch.stack([reading.indices for reading in readings])
        weights = torch.stack([reading.weights for reading in readings])
        values = torch.full((*indices.shape[:-1], NUM_EXPERTS), float("-inf"))
        values.scatter_(-1, indices, weights.log())
        way = Pathway(values, weights.sum(-1), TOP_K)
        assert worst(suffix.score(batch, way), plain(olmoe, ASKED)) < EXACT
        wide = Pathway(values, weights.sum(-1), NUM_EXPERTS)
        assert worst(suffix.score(batch, wide), plain(olmoe, ASKED)) < EXACT


def test_one_option_alone_scores_as_among_others(model):
    """`only` gives the scores of one option of each question, from the same states."""
    suffix, chosen = suffix_of(model, decisions=2), [1, 0, 2]
    way = pathway(suffix.sites, NUM_EXPERTS, depth=2)
    with suffix.running(), torch.no_grad():
        states = [reading.state for reading in suffix.read(ASKED)]
        every = suffix.score(suffix.batch(ASKED, states), way)
        one = suffix.batch(ASKED, states, only=chosen)
        scores = suffix.score(one, way)
    assert scores.shape[:2] == (3, 1)
    assert one.hidden.shape[1] < suffix.batch(ASKED, states).hidden.shape[1]
    for row, option in enumerate(chosen):
        length = len(ASKED[row].options[option])
        assert worst(scores[row : row + 1], [[every[row, option, :length]]]) < EXACT


def test_a_second_score_is_the_first(model):
    """What a batch keeps from pass to pass changes no score, in any order of pathways."""
    suffix = suffix_of(model, shift=True)
    ways = [None, pathway(suffix.sites, TOP_K), pathway(suffix.sites, NUM_EXPERTS, seed=1)]
    ways += [pathway(suffix.sites, TOP_K, mode="add"), pathway(suffix.sites, 10, mode="add")]
    with suffix.running(), torch.no_grad():
        states = [reading.state for reading in suffix.read(ASKED)]
        fresh = [suffix.score(suffix.batch(ASKED, states), way) for way in ways]
        batch = suffix.batch(ASKED, states)
        again = [suffix.score(batch, way) for way in [*ways, *ways[::-1]]]
    for one, other in zip(again, [*fresh, *fresh[::-1]], strict=True):
        assert float((one - other).abs().max()) < EXACT


def test_experts_are_called_for_what_counts(olmoe):
    """Never for padding, at most K wide; at the first site not again for what is known."""
    suffix, calls = suffix_of(olmoe), []
    real = sum(len(one.prompt) + sum(len(o) - 1 for o in one.options) for one in ASKED)
    tail = sum(1 + sum(len(o) - 1 for o in one.options) for one in ASKED)
    with suffix.running():
        hooked = [
            block.experts.register_forward_pre_hook(lambda _, args: calls.append(args[1].shape))
            for block in suffix.blocks
        ]
        batch = read_and_batch(suffix, ASKED)
        for width in (TOP_K, NUM_EXPERTS, NUM_EXPERTS):
            suffix.score(batch, pathway(suffix.sites, width))
        for hook in hooked:
            hook.remove()
    beyond = -(-NUM_EXPERTS // TOP_K) - 1  # rows of K for the experts beyond the first K
    wide = (tail + beyond * len(ASKED), TOP_K)
    first, second = calls[::2], calls[1::2]
    assert first == [(real, TOP_K), (tail, TOP_K), (NUM_EXPERTS * len(ASKED), 1), (1, 1)]
    assert second == [(real, TOP_K), (tail, TOP_K), wide, wide]


def test_states_can_be_stored(olmoe):
    """States survive safetensors, and readings hold no graph."""
    suffix = suffix_of(olmoe)
    with suffix.running():
        readings = suffix.read(ASKED)
        stored = [load(save(dict(reading.state))) for reading in readings]
        scores = suffix.score(suffix.batch(ASKED, stored), None)
    assert worst(scores, plain(olmoe, ASKED)) < EXACT
    assert not any(value.requires_grad for one in readings for value in one.state.values())


def test_a_reading_has_its_shapes(olmoe):
    """Readings of short prompts have D decision tokens too; the first one stands in front."""
    suffix = suffix_of(olmoe, decisions=3)
    with suffix.running():
        readings = suffix.read(ASKED)
    for reading in readings:
        assert reading.logits.shape == (3, 2, NUM_EXPERTS)
        assert reading.indices.shape == reading.weights.shape == (3, 2, TOP_K)
        assert reading.last.shape == reading.mean.shape == (olmoe.config.hidden_size,)
        best = reading.logits.topk(TOP_K).indices
        assert torch.equal(best.sort(-1).values, reading.indices.sort(-1).values)
    alone = readings[2]
    assert torch.equal(alone.logits[0], alone.logits[2])
    torch.testing.assert_close(alone.last, alone.mean)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["olmoe", "cohere2_moe"])
def test_attention_implementations(family, implementation):
    """Both give the plain pass, with one mask and with one by kind of layer."""
    model = tiny_moe(family)
    model.set_attn_implementation(implementation)
    suffix = suffix_of(model)
    with suffix.running():
        batch = read_and_batch(suffix, ASKED)
        assert worst(suffix.score(batch, None), plain(model, ASKED)) < EXACT


def test_bfloat16(olmoe):
    """A bfloat16 model gives float32 log-probabilities, near to those of its plain passes."""
    model = tiny_moe("olmoe").to(torch.bfloat16)
    suffix = suffix_of(model)
    way = pathway(suffix.sites, NUM_EXPERTS)
    with suffix.running():
        readings = suffix.read(ASKED)
        batch = suffix.batch(ASKED, [reading.state for reading in readings])
        scores = suffix.score(batch, way)
        (gradient,) = torch.autograd.grad(scores.sum(), way.values)
    assert scores.dtype == readings[0].logprobs.dtype == torch.float32
    wanted = plain(model, ASKED, edits(ASKED, suffix.sites, way, 1, False))
    assert worst(scores.detach(), wanted) < 0.05
    assert torch.isfinite(gradient).all()


def test_nothing_is_left_in_the_model():
    """After the block, also after an exception in a pass: no hook, weights and mode as before."""
    model = tiny_moe("olmoe").train()
    frozen = next(model.parameters()).requires_grad_(False)
    suffix = suffix_of(model, shift=True)
    with suffix.running():
        assert not model.training
        batch = read_and_batch(suffix, ASKED)
        hook = suffix.stack.layers[-1].register_forward_pre_hook(lambda *_: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            suffix.score(batch, pathway(suffix.sites, TOP_K, mode="add"))
        hook.remove()
        model.train(False)
        assert worst(suffix.score(batch, None), plain(model, ASKED)) < EXACT
    with pytest.raises(ZeroDivisionError), suffix.running():
        1 // 0  # noqa: B018
    assert hooks(model) == 0
    assert not frozen.requires_grad
    assert all(one.requires_grad for one in model.parameters() if one is not frozen)
    with suffix.running():
        assert worst(suffix.score(read_and_batch(suffix, ASKED), None), plain(model, ASKED)) < EXACT
    assert hooks(model) == 0


def test_a_pathway_that_does_not_fit_is_refused(olmoe):
    """Wrong shapes, no width, a shift that was not announced, states of other questions."""
    suffix = suffix_of(olmoe)
    with suffix.running():
        states = [reading.state for reading in suffix.read(ASKED)]
        batch = suffix.batch(ASKED, states)
        with pytest.raises(ConfigError, match="questions, decision tokens, sites, experts"):
            suffix.score(batch, pathway(suffix.sites[:1], TOP_K))
        with pytest.raises(ConfigError, match="width starts at 1"):
            suffix.score(batch, pathway(suffix.sites, 0))
        with pytest.raises(ConfigError, match="shift=True"):
            suffix.score(batch, pathway(suffix.sites, TOP_K, mode="add"))
        with pytest.raises(ConfigError, match="read the questions again"):
            suffix.batch(ASKED, states[::-1])


def test_positions_by_length_are_refused():
    """A rope that depends on the longest text of a batch has no suffix."""
    model = tiny_moe("olmoe")
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(UnsupportedModelError, match="longest text"):
        suffix_of(model)
