"""The front door: a base and a shelf in, one model out."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import expertmix as em
from expertmix.errors import CheckpointError, ConfigError, UnsupportedRuntimeError
from expertmix.experts.lora import Adapter
from expertmix.experts.peft_folder import read_library
from expertmix.routers.calibrated import Calibrated
from expertmix.routers.pooled import Pooled
from expertmix.routers.spectr import SpectR

from .world import IDS, close, logits_of, peft_model, random_adapter, state, tiny_llama


def test_it_stays_a_transformers_model(library: Path):
    """The very model, adapted; it generates, is recorded as it is, and comes back bit for bit."""
    model = tiny_llama()
    plain, was = logits_of(model), state(model)
    assert em.compose(model, library) is model
    assert not torch.equal(logits_of(model), plain)
    with em.record(model) as trace:
        model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4)
    assert [site.name for site in trace.sites] == [info.site.name for info in em.sites(model)]
    assert trace.meta.sites[0].experts == ("ada", "bob", "cyd", "dee", "eve")
    em.Composed.of(model).uninstall()
    assert state(model) == was
    assert torch.equal(logits_of(model), plain)
    assert em.Composed.of(model) is None


def test_the_default_router_is_pooled_and_calibrated(library: Path):
    """Without any text: on what the base writes by itself, the same each time."""
    router = em.Composed.of(em.compose(tiny_llama(), library)).plan.router
    again = em.Composed.of(em.compose(tiny_llama(), library)).plan.router
    assert isinstance(router, Pooled)
    assert isinstance(router.inner, Calibrated)
    for module, level in router.inner.levels.items():
        assert torch.equal(level.mean, again.inner.levels[module].mean)


def test_calibration_on_text_or_none(library: Path):
    """Token ids of the user's are used instead; None leaves the evidence raw."""
    own = em.Composed.of(em.compose(tiny_llama(), library)).plan.router
    text = em.Composed.of(em.compose(tiny_llama(), library, calibration=[IDS])).plan.router
    raw = em.Composed.of(em.compose(tiny_llama(), library, calibration=None)).plan.router
    module = "model.layers.0.mlp.up_proj"
    assert not torch.equal(own.inner.levels[module].mean, text.inner.levels[module].mean)
    assert raw == Pooled()
    one = em.Composed.of(em.compose(tiny_llama(), library, calibration=IDS)).plan.router
    assert torch.equal(one.inner.levels[module].mean, text.inner.levels[module].mean)
    with pytest.raises(ConfigError, match="calibration"):
        em.compose(tiny_llama(), library, calibration="mine")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("some words", "tensor of token ids.*'some words'"),
        ([1, 2, 3], "tensor of token ids"),
        (torch.ones(2, 5), "float32"),
        (IDS[0], r"\(9,\)"),
        (IDS + 1000, "0 to 31.*another tokenizer"),
    ],
)
def test_a_calibration_that_is_no_text(library: Path, text, words):
    """Words, lists, other shapes and ids of another vocabulary are told; the model is untouched."""
    model = tiny_llama()
    was = state(model)
    with pytest.raises(ConfigError, match=words):
        em.compose(model, library, calibration=[text])
    assert state(model) == was


@pytest.mark.parametrize("adapters", [None, 5, [random_adapter("a", 1)]])
def test_what_holds_no_adapters_is_told(adapters):
    """The message says what may be given instead."""
    with pytest.raises(ConfigError, match=r"Shelf\.of"):
        em.compose(tiny_llama(), adapters)


@pytest.mark.parametrize(
    ("router", "expected"),
    [
        ("spectr", SpectR()),
        ({"kind": "spectr", "top_k": 1, "score": "energy"}, SpectR("energy", top_k=1)),
        (SpectR(top_k=2), SpectR(top_k=2)),
    ],
)
def test_a_router_by_name_mapping_or_itself(library: Path, router, expected):
    """All three ways say the same."""
    assert em.Composed.of(em.compose(tiny_llama(), library, router)).plan.router == expected


def test_called_again_it_changes_the_shelf(library: Path):
    """The second call gives what a fresh model would have got; calibration sees the base alone."""
    model = em.compose(tiny_llama(), library)
    em.compose(model, [library / "ada", library / "cyd"])
    fresh = em.compose(tiny_llama(), [library / "ada", library / "cyd"])
    close(logits_of(model), logits_of(fresh))
    em.compose(model, library, "uniform", combination="aligned")
    assert em.Composed.of(model).plan.combination == "aligned"
    before = logits_of(model)
    with pytest.raises(ConfigError):
        em.compose(model, library, {"kind": "fixed", "weights": {"zoe": 1}})
    assert torch.equal(logits_of(model), before)
    with em.record(model), pytest.raises(UnsupportedRuntimeError, match="recording"):
        em.compose(model, library, "uniform")


def test_a_live_peft_model(library: Path):
    """Its adapters are the shelf, and rest themselves: also while the base writes its own text."""
    rival = peft_model(library / "ada", library / "cyd")
    model = em.compose(rival, rival)
    fresh = em.compose(tiny_llama(), [library / "ada", library / "cyd"])
    close(logits_of(model), logits_of(fresh))


def test_on_a_moe_both_kinds_of_sites_are_seen(tmp_path: Path):
    """Adapters on a MoE's attention: one trace holds adapters and experts; masks reach both."""
    from expertmix.testing import tiny_moe

    model = tiny_moe("mixtral")
    names = [path for path, _ in model.named_modules() if path.endswith("q_proj")]
    out, width = model.get_submodule(names[0]).weight.shape
    shelf = em.Shelf.of(
        random_adapter(name, seed, names, shape=(out, width), dtype=torch.float32)
        for seed, name in enumerate("ab")
    )
    experts = {info.site.name for info in em.sites(model)}
    em.compose(model, shelf, "uniform")
    ids = torch.arange(3, 9)[None]
    with em.record(model) as trace:
        model(ids)
    found = [site.name for site in trace.sites]
    assert experts | set(names) == set(found)
    assert found.index(names[0]) < found.index(min(experts))
    assert len(trace[found[0]].indices) == len(trace[found[-1]].indices) == 6
    edits = em.Mask(min(experts), experts=[0]), em.Ablate(names[0], experts=[0])
    with em.record(model, *edits) as edited:
        model(ids)
    assert not (edited[min(experts)].indices == 0).any()
    assert edited[names[0]].dense()[:, 0].abs().max() == 0


def test_a_second_shelf_on_top_is_refused(library: Path):
    """Composed twice would add twice; a copy shares the original's shelf: both are told."""
    model = em.compose(tiny_llama(), library, "uniform")
    with pytest.raises(ConfigError, match="already"):
        em.Composed(model, em.Shelf.open(library), SpectR())
    with pytest.raises(UnsupportedRuntimeError, match="copy"):
        em.record(copy.deepcopy(model)).__enter__()


def test_an_adapter_of_a_base_of_another_name(library: Path):
    """Hub ids are compared by their last part; any_base allows it; folders may have any name."""
    adapters = [Adapter(one.name, one.factors, "owner/Other-1B") for one in read_library(library)]
    shelf = em.Shelf.of(adapters)
    model = tiny_llama()
    model.config.name_or_path = "someone/tiny"
    with pytest.raises(CheckpointError, match="Other-1B"):
        em.compose(model, shelf, "uniform")
    assert em.Composed.of(model) is None
    em.compose(model, shelf, "uniform", any_base=True)
    mirror = tiny_llama()
    mirror.config.name_or_path = "mirror/other-1b"
    em.compose(mirror, shelf, "uniform")
    local = tiny_llama()
    local.config.name_or_path = "/models/whatever"
    em.compose(local, shelf, "uniform")


def test_a_model_in_training_is_calibrated_as_in_evaluation(library: Path):
    """No dropout, no draw from the user's random numbers; afterwards it trains on."""
    quiet = em.compose(tiny_llama(attention_dropout=0.5), library)
    model = tiny_llama(attention_dropout=0.5).train()
    model.model.layers[0].train(False)
    torch.manual_seed(3)
    em.compose(model, library)
    first = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), first)
    assert model.training
    assert not model.model.layers[0].training
    levels = [em.Composed.of(one).plan.router.inner.levels for one in (quiet, model)]
    for module, level in levels[0].items():
        assert torch.equal(level.mean, levels[1][module].mean)


def test_more_adapters_than_there_are_is_an_error_where_it_was_asked_for(library: Path):
    """A default that is too large uses what is there; a number in the mapping is refused."""
    few = [library / "ada", library / "cyd"]
    em.compose(tiny_llama(), few, "spectr")
    with pytest.raises(ConfigError, match=r"top_k=4.*2 adapters"):
        em.compose(tiny_llama(), few, {"kind": "spectr", "top_k": 4})
