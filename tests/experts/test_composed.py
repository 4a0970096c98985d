"""A shelf on a model: it computes what a naive loop computes, and leaves no trace."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from expertmix.errors import CheckpointError, ConfigError
from expertmix.experts.composed import Composed
from expertmix.experts.lora import Adapter, Factors
from expertmix.experts.peft_folder import read_adapter, read_library
from expertmix.experts.shelf import Shelf
from expertmix.routers.arrow import Arrow
from expertmix.routers.fixed import Fixed
from expertmix.routers.lag import Lag
from expertmix.routers.spectr import SpectR

from .world import (
    ALL,
    IDS,
    arrow_score,
    close,
    deltas,
    double,
    energy_score,
    logits_of,
    more,
    naive,
    peft_model,
    projection_score,
    random_adapter,
    state,
    tiny_llama,
    top_weights,
)

NAMES = ("ada", "bob", "cyd", "dee")


@pytest.mark.parametrize(
    ("router", "score"),
    [
        (SpectR("projection", top_k=2), projection_score),
        (SpectR("energy", top_k=3, weights="softmax", temperature=5.0), energy_score),
        (Arrow(top_k=2), arrow_score),
    ],
)
@pytest.mark.parametrize("copies", [1, 8])
def test_it_computes_what_a_naive_loop_computes(library: Path, router, score, copies):
    """Full SVDs, loops over tokens and adapters, float64: the same logits; few and many."""
    adapters = double(list(read_library(library)) + more(5 * (copies - 1)))
    reference, rule = tiny_llama(dtype=torch.float64), router.rule

    def weigh(module, flat):
        updates = deltas(adapters, module)
        return torch.stack(
            [
                top_weights(
                    [score(x, update) for update in updates], rule.top_k, rule.weights,
                    rule.temperature,
                )
                for x in flat
            ]
        )  # fmt: skip

    ids = IDS[:, :5]
    with naive(reference, adapters, weigh):
        expected = logits_of(reference, ids)
    with Composed(tiny_llama(dtype=torch.float64), Shelf.of(adapters), router) as composed:
        torch.testing.assert_close(logits_of(composed.model, ids), expected)


def test_permuting_the_shelf_changes_nothing(library: Path):
    """The order of the adapters does not matter to the model."""
    adapters = list(read_library(library))
    found = []
    for order in ([0, 1, 2, 3, 4], [3, 0, 4, 2, 1]):
        shelf = Shelf.of([adapters[expert] for expert in order])
        with Composed(tiny_llama(), shelf, SpectR(top_k=2)) as composed:
            found.append(logits_of(composed.model))
    close(*found)


def test_uninstall_restores_bit_for_bit(library: Path):
    """Hooks only: same modules, weights and attributes during, nothing left afterwards."""
    model = tiny_llama()
    before, was = logits_of(model), state(model)
    keys = list(model.state_dict())
    composed = Composed(model, Shelf.open(library), SpectR())
    assert list(model.state_dict()) == keys
    assert not torch.equal(logits_of(model), before)
    composed.uninstall()
    composed.uninstall()
    assert torch.equal(logits_of(model), before)
    assert state(model) == was


def test_generate_is_greedy_decoding_without_a_cache(library: Path):
    """Cached generation gives the tokens of passes over the whole text."""
    with Composed(tiny_llama(), Shelf.open(library), SpectR(top_k=2)) as composed:
        ids = IDS[:1]
        out = composed.model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False)
        for _ in range(8):
            scores = logits_of(composed.model, ids)[:, -1].clone()
            scores[:, 2] = float("-inf")  # min_new_tokens forbids the end
            ids = torch.cat([ids, scores.argmax(1, keepdim=True)], 1)
    assert torch.equal(out, ids)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(library: Path, side):
    """A padded row gets the logits it gets alone."""
    padding = torch.zeros(1, 3, dtype=torch.int64)
    row = [padding, IDS[:1, :6]] if side == "left" else [IDS[:1, :6], padding]
    ids = torch.cat([torch.cat(row, 1), IDS[1:]])
    mask = (ids != 0).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with Composed(tiny_llama(), Shelf.open(library), SpectR(top_k=2)) as composed:
        alone = logits_of(composed.model, IDS[:1, :6])
        batch = logits_of(composed.model, ids, attention_mask=mask, position_ids=positions)
    close(batch[0][mask[0].bool()], alone[0])


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        (random_adapter("odd", 1, ["model.layers.7.mlp.up_proj"]), "layers.7.*does not have"),
        (random_adapter("odd", 1, ["model.layers.0.mlp.down_proj"]), r"\(48, 32\).*\(32, 48\)"),
        (random_adapter("odd", 1, ["model.embed_tokens"]), "an? Embedding: only linear"),
        (random_adapter("odd", 1, ["model.norm"]), "only linear"),
    ],
)
def test_an_adapter_of_another_base_is_refused(library: Path, adapter, words):
    """Missing modules, other shapes and modules that are not linear: named, model untouched."""
    model = tiny_llama()
    was = state(model)
    with pytest.raises(CheckpointError, match=f"'odd'.*{words}"):
        Composed(model, Shelf.open(library).plus(adapter), SpectR())
    assert state(model) == was


def test_what_cannot_be_composed(library: Path):
    """An idle shelf, an unknown adapter in the router, an unknown combination."""
    model = tiny_llama()
    with pytest.raises(CheckpointError, match="does anything"):
        Composed(model, Shelf.open(library / "eve"), SpectR())
    with pytest.raises(ConfigError, match="no adapter 'zoe'"):
        Composed(model, Shelf.open(library), Fixed("zoe"))
    with pytest.raises(ConfigError, match="combination"):
        Composed(model, Shelf.open(library), SpectR(), combination="sum")  # type: ignore[arg-type]


def test_fingerprints_tell_compositions_apart(library: Path):
    """Other adapters or another base have another fingerprint; router and wrappers do not count."""
    shelf = Shelf.open(library)

    def mark(model, shelf, router=SpectR()):  # noqa: B008
        with Composed(model, shelf, router) as composed:
            return composed.fingerprint()

    mine = mark(tiny_llama(), shelf)
    assert mine == mark(tiny_llama(), shelf, Lag())
    assert mine == mark(peft_model(library / "ada"), shelf)
    assert mine != mark(tiny_llama(), shelf.minus("bob"))
    assert mine != mark(tiny_llama(seed=1), shelf)


def test_all_modules_are_sites(library: Path):
    """One site per module where an adapter does something; experts are numbered as on the shelf."""
    with Composed(tiny_llama(), Shelf.open(library), SpectR(top_k=3)) as composed:
        sites = {info.site.name: info for info in composed.sites}
    assert len(sites) == 2 * len(ALL)
    assert {info.num_experts for info in sites.values()} == {5}
    assert {info.experts for info in sites.values()} == {(*NAMES, "eve")}
    assert sites["model.layers.1.mlp.up_proj"].top_k == 3  # ada, cyd, dee
    assert sites["model.layers.0.mlp.up_proj"].top_k == 2  # ada, cyd
    assert read_adapter(library / "dee").factors.keys() == {"model.layers.1.mlp.up_proj"}


@pytest.mark.parametrize("combination", ["outputs", "aligned"])
def test_signs_of_the_factors_do_not_matter(library: Path, combination):
    """(-A, -B) is the same adapter, in both combinations."""
    adapters = list(read_library(library))
    flipped = [
        Adapter(one.name, {m: Factors(-f.down, -f.up, f.scale) for m, f in one.factors.items()})
        for one in adapters
    ]
    found = []
    for shelf in (Shelf.of(adapters), Shelf.of(flipped)):
        with Composed(tiny_llama(), shelf, SpectR(top_k=2), combination=combination) as composed:
            found.append(logits_of(composed.model))
    close(*found)


def test_after_uninstall_nothing_is_put_on_again(library: Path):
    """A handle of a model that was given back changes nothing on it."""
    model = tiny_llama()
    was = state(model)
    composed = Composed(model, Shelf.open(library), SpectR())
    composed.uninstall()
    with pytest.raises(ConfigError, match="taken off"):
        composed.change(router=Lag())
    assert state(model) == was
