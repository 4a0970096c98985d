"""`open_pathways` gives an exact suffix or says why not, for every family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pathway_cases import EXACT, edits, hooks, pathway, plain, questions, read_and_batch, worst

import expertmix as em
from expertmix.bindings.families import TESTED
from expertmix.bindings.pathway_tap import shares
from expertmix.bindings.pathways import open_pathways
from expertmix.bindings.suffix import Suffix
from expertmix.bindings.whole import Whole
from expertmix.core.pathway import Question
from expertmix.errors import (
    ConfigError,
    NoSitesError,
    UnknownSiteError,
    UnsupportedRuntimeError,
)
from expertmix.testing import NUM_EXPERTS, TOP_K, tiny_adapters, tiny_lm, tiny_moe

ASKED = questions()
FULL_PASSES = {
    "axk2", "bailing_hybrid", "deepseek_v32", "deepseek_v4", "dots3_note_text", "gemma4",
    "gemma4_text", "glm_moe_dsa", "granitemoehybrid", "hy_v4", "inkling2_text", "inkling_text",
    "jamba", "kimi_linear", "lara_mini", "lfm2_moe", "longcat_flash", "minimax", "nemotron_h",
    "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_next", "qwen4_exp", "qwen4_exp_text", "zaya",
}  # fmt: skip


@pytest.mark.parametrize("family", TESTED)
def test_every_family_is_exact_or_says_why_not(family):
    """Either way, a pathway gives what its interventions give in plain passes."""
    model = tiny_moe(family)
    asked = [ASKED[0], ASKED[2]]
    with open_pathways(model, layers="last 2") as pathways:
        assert pathways.exact == isinstance(pathways, Suffix) == (family not in FULL_PASSES)
        assert (pathways.notice is None) == pathways.exact
        info = pathways.sites[0]
        batch = read_and_batch(pathways, asked)
        for width in sorted({info.top_k, info.num_experts}):
            way = pathway(pathways.sites, width, rows=2)
            scores = pathways.score(batch, way)
            wanted = plain(model, asked, edits(asked, pathways.sites, way, 1, False))
            assert worst(scores.detach(), wanted) < EXACT
            (gradient,) = torch.autograd.grad(scores.sum(), way.values)
            assert torch.isfinite(gradient).all()
    assert hooks(model) == 0


def test_the_docs_say_which():
    """docs/models.md names the families that are read by full passes, and no others."""
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    section = page.partition("## Pathways")[2].partition("\n## ")[0]
    assert {name for name in TESTED if f"`{name}`" in section} == FULL_PASSES


@pytest.mark.parametrize("layers", [[0, 2], ["model.layers.0.mlp", 2], [2, 0, 2]])
def test_layers_need_not_be_neighbors(layers):
    """The suffix enters at the first critical layer; layers between route as they do."""
    model = tiny_moe("olmoe")
    with open_pathways(model, layers=layers, decisions=2, scored=True) as pathways:
        assert pathways.exact
        assert [info.site.name for info in pathways.sites] == [
            "model.layers.0.mlp", "model.layers.2.mlp",
        ]  # fmt: skip
        batch = read_and_batch(pathways, ASKED)
        way = pathway(pathways.sites, NUM_EXPERTS, depth=2)
        wanted = plain(model, ASKED, edits(ASKED, pathways.sites, way, 2, True))
        assert worst(pathways.score(batch, way).detach(), wanted) < EXACT


@pytest.mark.parametrize(
    ("layers", "numbers"),
    [("last 1", [3]), ("last 5", [0, 1, 2, 3]), ("all", [0, 1, 2, 3]), ("*.layers.[12].*", [1, 2])],
)
def test_layers_have_names(layers, numbers):
    """The last N, at most all; all; a pattern."""
    with open_pathways(tiny_moe("olmoe"), layers=layers) as pathways:
        found = [info.site.name for info in pathways.sites]
    assert found == [f"model.layers.{number}.mlp" for number in numbers]


def test_layers_that_cannot_be_are_refused():
    """A dense layer, an unknown name, none at all, a dense model, no decision token."""
    model = tiny_moe("deepseek_v3")  # its first layer is dense
    for layers, error, words in (
        ([0, 2], UnknownSiteError, "layer 0 has no routed module.*1, 2, 3"),
        ("*.layers.9.*", UnknownSiteError, "no site matches"),
        ("last 0", ConfigError, "names no layer"),
        ([], ConfigError, "names no layer"),
    ):
        with pytest.raises(error, match=words), open_pathways(model, layers=layers):
            pass
    with pytest.raises(NoSitesError), open_pathways(tiny_lm("llama")):
        pass
    with pytest.raises(ConfigError, match="decisions=0"), open_pathways(model, decisions=0):
        pass
    assert hooks(model) == 0


def test_unlike_sites_are_refused(tmp_path):
    """Adapters on a MoE: sites of both kinds make no one table; a pattern chooses."""
    library = tiny_adapters(tmp_path, tiny_moe("olmoe"), ["a", "b"], targets=("q_proj",))
    model = em.compose(tiny_moe("olmoe"), library, "uniform")
    with pytest.raises(ConfigError, match="equally many experts"), open_pathways(model):
        pass
    with open_pathways(model, layers="*.mlp") as pathways:
        assert isinstance(pathways, Whole)
        way = pathway(pathways.sites, NUM_EXPERTS)
        scores = pathways.score(read_and_batch(pathways, ASKED), way).detach()
        wanted = plain(model, ASKED, edits(ASKED, pathways.sites, way, 1, False))
        assert worst(scores, wanted) < EXACT


def test_what_reads_a_text_in_a_way_of_its_own_is_found_out():
    """A model that mixes neighboring tokens behind our back is measured, not believed."""
    model = tiny_moe("olmoe")

    def mix(module, args):
        before = torch.nn.functional.pad(args[0], (0, 0, 1, 0))[:, :-1]
        return (args[0] + 0.5 * before,)

    hook = model.model.layers[3].mlp.register_forward_pre_hook(mix)
    said = []
    with open_pathways(model, layers="last 2", progress=lambda *step: said.append(step)) as found:
        assert isinstance(found, Whole)
        assert "differ by" in found.notice
        assert (found.notice, 1, 1) in said
    hook.remove()
    assert hooks(model) == 0


@pytest.mark.parametrize("window", [16, 64])
def test_windows_are_the_models_own(window):
    """Sliding attention is right also where the made-up texts of the check are shorter."""
    model = tiny_moe("gpt_oss", sliding_window=window)
    generator = torch.Generator().manual_seed(9)
    long = tuple(torch.randint(3, 90, (80,), generator=generator).tolist())
    asked = [Question(long, ASKED[0].options), ASKED[1], ASKED[2]]
    with open_pathways(model, layers="last 2") as pathways:
        assert pathways.exact
        assert (
            worst(pathways.score(read_and_batch(pathways, asked), None), plain(model, asked))
            < EXACT
        )
    assert model.config.sliding_window == window


def test_bfloat16_is_exact_too():
    """Where log-probabilities are rounded, the suffix is held against the model's own rounding."""
    for family in ("olmoe", "gpt_oss", "deepseek_v3"):
        with open_pathways(tiny_moe(family).to(torch.bfloat16), layers="last 2") as pathways:
            assert pathways.exact


def test_the_block_gives_the_model_back():
    """After an exception in the block there is no hook, weights want gradients again."""
    model = tiny_moe("mixtral")
    with pytest.raises(ZeroDivisionError), open_pathways(model, shift=True):
        1 // 0  # noqa: B018
    assert hooks(model) == 0
    assert all(one.requires_grad for one in model.parameters())
    with open_pathways(model) as pathways:
        assert pathways.fingerprint() == em.bindings.bind(model).fingerprint()
        assert (pathways.decisions, pathways.scored) == (1, False)
        assert pathways.sites[0].top_k == TOP_K


@pytest.mark.parametrize("family", ["olmoe", "jamba"])
def test_a_model_is_open_once(family):
    """Open pathways and record blocks do not mix; the outer block goes on as if nothing was."""
    model = tiny_moe(family)
    with open_pathways(model, layers="last 1") as pathways:
        batch = read_and_batch(pathways, ASKED)
        before = pathways.score(batch, None)
        with pytest.raises(UnsupportedRuntimeError, match="leave that block first"):
            open_pathways(model, layers="last 1").__enter__()
        assert torch.equal(pathways.score(batch, None), before)
    edit = em.Ablate("*", experts=[3])
    for edits_of_it in ((), (edit,)):
        with em.record(model, *edits_of_it) as trace:
            with pytest.raises(UnsupportedRuntimeError, match="leave that block first"):
                open_pathways(model, layers="last 1").__enter__()
            model(torch.tensor([ASKED[0].prompt]))
        assert len(trace.tokens.sample) == len(ASKED[0].prompt)
    assert hooks(model) == 0
    assert all(one.requires_grad for one in model.parameters())


def test_adapters_are_open_once(tmp_path):
    """As a MoE is."""
    library = tiny_adapters(tmp_path, tiny_lm("llama"), ["a", "b"], targets=("q_proj",))
    model = em.compose(tiny_lm("llama"), library, "uniform")
    for _ in range(2):
        with (
            open_pathways(model, layers="last 1"),
            pytest.raises(UnsupportedRuntimeError, match="leave that block first"),
        ):
            open_pathways(model, layers="last 1").__enter__()


@pytest.mark.parametrize("family", ["olmoe", "jamba"])
def test_recording_inside_of_open_pathways_is_recording(family):
    """Plain passes there are edited and recorded as anywhere; scores stay what they were."""
    model, ids = tiny_moe(family), torch.tensor([ASKED[0].prompt])
    edit = em.Ablate("*", experts=[3])
    with em.record(model, edit, logits=True) as trace, torch.no_grad():
        wanted = model(ids).logits
    with open_pathways(model, layers="last 1", shift=True) as pathways:
        batch = read_and_batch(pathways, ASKED)
        before = pathways.score(batch, None)
        with em.record(model, edit, logits=True) as again, torch.no_grad():
            assert torch.equal(model(ids).logits, wanted)
        assert torch.equal(pathways.score(batch, None), before)
    for site in trace.sites:
        assert torch.equal(again[site].weights, trace[site].weights)


def test_an_interrupt_leaves_nothing():
    """After a KeyboardInterrupt in the middle of a pass: the next score, and the model after."""
    model = tiny_moe("olmoe")
    plainly = plain(model, ASKED)
    with open_pathways(model, layers="last 2", shift=True) as pathways:
        batch = read_and_batch(pathways, ASKED)
        way = pathway(pathways.sites, TOP_K, mode="add")
        before = pathways.score(batch, way).detach()

        def interrupt(*_):
            raise KeyboardInterrupt

        for module in (model.model.layers[-1].mlp.gate, model.model.layers[-1].mlp.experts):
            for run in (lambda: pathways.score(batch, way), lambda: pathways.read(ASKED)):
                hook = module.register_forward_pre_hook(interrupt)
                with pytest.raises(KeyboardInterrupt):
                    run()
                hook.remove()
                assert torch.equal(pathways.score(batch, way).detach(), before)
                assert worst([one.logprobs for one in pathways.read(ASKED)], plainly) < EXACT
    assert hooks(model) == 0
    assert worst(plain(model, ASKED), plainly) == 0


@pytest.mark.parametrize("family", ["olmoe", "jamba"])
def test_no_questions_have_no_readings(family):
    """And are no error."""
    with open_pathways(tiny_moe(family), layers="last 1") as pathways:
        assert pathways.read([]) == []


def test_a_tokens_shares_do_not_depend_on_other_tokens():
    """Of one that is NaN, or one whose weights another link explains; equal weights are a tie."""
    logits = torch.randn(3, 6, generator=torch.Generator().manual_seed(0)) * 3
    indices = logits.topk(2).indices
    picked = logits.gather(1, indices)
    softmax, sigmoid = picked.softmax(1), picked.sigmoid()
    for weights in (softmax * 1.5, sigmoid, torch.stack([softmax[0], sigmoid[1], sigmoid[2]])):
        weights[0] = weights[0] * torch.nan if weights is sigmoid else weights[0]
        together = shares(logits, indices, weights)
        for row in range(3):
            one = slice(row, row + 1)
            assert torch.equal(together[one], shares(logits[one], indices[one], weights[one]))
            got = together[row, indices[row]].softmax(0) * weights[row].sum()
            assert torch.isnan(weights[row]).any() or torch.allclose(got, weights[row], atol=1e-5)
