"""Routers side by side, on a tiny Llama with adapters made by PEFT."""

from __future__ import annotations

import math
from contextlib import contextmanager

import pytest
import torch
from experts.world import calm

from expertmix.errors import ConfigError
from expertmix.experts.shelf import Shelf
from expertmix.routers.fixed import Fixed
from expertmix.routers.oracle import Oracle
from expertmix.routers.spectr import SpectR
from expertmix.routers.uniform import Uniform
from expertmix.study.contest import Contestant, Reading, read
from expertmix.study.corpus import Corpus, Sample, encode
from expertmix.study.evaluation import Evaluation, evaluate
from expertmix.study.evaluation_tables import (
    evaluation_figures,
    labels_table,
    routers_table,
    routing_check,
    tables,
)
from expertmix.study.loading import load_model
from expertmix.study.outputs import as_json
from expertmix.study.prompts import Prompt
from expertmix.testing import tiny_tokenizer
from study.composing import ADAPTERS, MODULES, TEXTS

LABELS = tuple(label for _, label in TEXTS)


@pytest.fixture
def model(base):
    return load_model(str(base), device="cpu")


@pytest.fixture
def shelf(library):
    return Shelf.open(library)


def corpus(labels=LABELS):
    prompts = [Prompt(text, label) for (text, _), label in zip(TEXTS, labels, strict=True)]
    return encode(prompts, tiny_tokenizer(), context=None)


ROUTERS = {
    "spectr": SpectR(top_k=1),
    "uniform": Uniform(),
    "base": None,
    "oracle": Oracle(LABELS),
}


@torch.no_grad()
def nats(model, ids) -> float:
    """Loss of one text, alone and unpadded."""
    row = torch.tensor([ids])
    return float(model(row, labels=row).loss) * (len(ids) - 1)


def test_losses_are_those_of_each_text_read_alone(model, shelf, library):
    """Whatever it shared a batch with: the base's, and PEFT's own under the text's own adapter."""
    from peft import PeftModel

    found = evaluate(model, shelf, ROUTERS, corpus(), batch_size=3)
    expected = [nats(model, sample.ids) for sample in corpus().samples]
    assert found.readings["base"].losses == pytest.approx(expected, rel=1e-4)
    assert found.readings["base"].predicted == tuple(len(s.ids) - 1 for s in corpus().samples)
    with calm():
        peft = PeftModel.from_pretrained(model, str(library / "ada"), adapter_name="ada")
        for name in ADAPTERS[1:]:
            peft.load_adapter(str(library / name), adapter_name=name)
        own = []
        for sample in corpus().samples:
            peft.set_adapter(sample.label)
            own.append(nats(peft.eval(), sample.ids))
    assert found.readings["oracle"].losses == pytest.approx(own, rel=1e-3)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_the_size_of_a_batch_changes_nothing(model, shelf, batch_size):
    """Neither losses nor where tokens go: padding is left out."""
    one = evaluate(model, shelf, ROUTERS, corpus(), batch_size=batch_size)
    other = evaluate(model, shelf, ROUTERS, corpus(), batch_size=3)
    for name in ROUTERS:
        assert one.readings[name].losses == pytest.approx(other.readings[name].losses, rel=1e-3)
    counts, same = one.readings["spectr"].routing, other.readings["spectr"].routing
    assert counts is not None
    assert same is not None
    assert counts.tokens.tolist() == [len(sample.ids) for sample in corpus().samples]
    assert (counts.right - same.right).abs().max() <= 0.5  # a near tie may fall otherwise
    assert counts.levels.sites == same.levels.sites
    assert len(counts.levels.sites) == MODULES


def test_the_oracle_is_always_right_and_uniform_as_good_as_chance(model, shelf):
    """Per token, per text and at every level that its adapter reaches."""
    found = evaluate(model, shelf, ROUTERS, corpus())
    assert found.accuracy("oracle").value == found.text_accuracy("oracle").value == 1
    ones = evaluate(model, shelf, {"one": Fixed("ada")}, corpus())
    assert ones.accuracy("one", "ada").value == 1
    assert ones.accuracy("one", "bob").value == 0
    everywhere = found.level_accuracy("uniform")["model.layers.1.mlp.up_proj#0"]
    tokens = [len(sample.ids) for sample in corpus().samples]
    here = sum(n for n, label in zip(tokens, LABELS, strict=True) if label in ("ada", "cyd"))
    assert everywhere == pytest.approx(here / sum(tokens) / 2)  # two adapters act there
    assert found.accuracy("base") is None


def test_differences_are_to_the_main_one(model, shelf):
    """Zero with itself, for sure; the mean over tokens of all texts, or of a label's."""
    found = evaluate(model, shelf, ROUTERS, corpus(), main="base")
    own = found.difference("base")
    assert (own.value, own.low, own.high) == (0, 0, 0)
    gap = found.difference("uniform", "bob")
    readings = found.readings
    rows = [n for n, label in enumerate(LABELS) if label == "bob"]
    tokens = sum(readings["base"].predicted[n] for n in rows)
    expected = sum(readings["uniform"].losses[n] - readings["base"].losses[n] for n in rows)
    assert gap.value == pytest.approx(expected / tokens)
    assert found.loss("base", "cyd").value == pytest.approx(readings["base"].losses[2] / 17)
    assert math.isnan(found.loss("base", "cyd").low)  # one text only


def by_hand(**losses: tuple[float, ...]) -> Evaluation:
    """Four texts of ten predicted tokens with these nats."""
    samples = tuple(Sample(tuple(range(11)), label, "") for label in ("a", "a", "b", "b"))
    readings = {name: Reading(name, nats, (10,) * 4, 0.0) for name, nats in losses.items()}
    return Evaluation(Corpus(samples), readings, next(iter(losses)))


def test_the_gain_recovered_is_a_share_of_the_oracle_s():
    """(base − router) / (base − oracle): of all texts, and of a label's; with an interval."""
    found = by_hand(
        mine=(30, 28, 20, 20), base=(40, 40, 20, 20), oracle=(20, 20, 20, 20), worse=(50, 40, 30, 9)
    )
    assert found.recovered("mine").value == pytest.approx(22 / 40)
    assert found.recovered("mine", "a").value == pytest.approx(22 / 40)
    assert found.recovered("mine", "a").low == pytest.approx(0.5)
    assert found.recovered("mine", "a").high == pytest.approx(0.6)
    assert found.recovered("worse").value < 0
    assert found.recovered("oracle").value == 1


def test_where_the_oracle_gains_nothing_there_is_no_share():
    """Nor where base or oracle did not take part."""
    found = by_hand(mine=(30, 28, 20, 20), base=(40, 40, 20, 20), oracle=(20, 20, 20.2, 20))
    assert found.recovered("mine", "b") is None
    assert by_hand(mine=(1, 1, 1, 1), base=(2, 2, 2, 2)).recovered("mine") is None
    assert by_hand(mine=(1, 1, 1, 1), oracle=(2, 2, 2, 2)).recovered("mine") is None


def test_labels_that_name_no_adapter_are_labels_all_the_same(model, shelf):
    """Losses are told for them, routing is judged on the others alone."""
    labels = ("ada", "poetry", "cyd", "ada", "poetry")
    found = evaluate(model, shelf, {"uniform": Uniform(), "base": None}, corpus(labels))
    assert found.own_labels == ("ada", "cyd")
    assert found.loss("uniform", "poetry").value > 0
    assert found.accuracy("uniform", "poetry") is None
    assert set(found.confusion("uniform")) == {"ada", "poetry", "cyd"}
    none = evaluate(model, shelf, {"uniform": Uniform()}, corpus((None,) * 5))
    assert none.accuracy("uniform") is None
    assert none.level_accuracy("uniform") == {}
    assert routing_check(none, "uniform") is None


def test_any_model_can_take_part(model, shelf):
    """Given as a context manager that is open only while it reads."""
    opened = []

    @contextmanager
    def scaled():
        opened.append("in")
        yield model
        opened.append("out")

    others = [Contestant("scaled", scaled), Contestant.model("as it is", model)]
    found = evaluate(model, shelf, {"base": None}, corpus(), others=others)
    assert opened == ["in", "out"]
    assert found.names == ("base", "scaled", "as it is")
    assert found.difference("scaled").value == 0
    assert found.readings["scaled"].routing is None


def test_the_model_is_left_as_it_was(model, shelf):
    """No hook, no adapter."""
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    before = model(torch.tensor([corpus().samples[0].ids])).logits
    evaluate(model, shelf, ROUTERS, corpus())
    assert sum(len(module._forward_hooks) for module in model.modules()) == hooks
    assert torch.equal(model(torch.tensor([corpus().samples[0].ids])).logits, before)


def test_what_cannot_be_compared_is_told(model, shelf):
    """Names twice, no contestant, no such main one, an oracle of other texts, no batch."""
    twice = [Contestant.model("base", model)]
    with pytest.raises(ConfigError, match="names of their own"):
        evaluate(model, shelf, {"base": None}, corpus(), others=twice)
    with pytest.raises(ConfigError, match="at least one"):
        evaluate(model, shelf, {}, corpus())
    with pytest.raises(ConfigError, match="no contestant 'arrow'"):
        evaluate(model, shelf, {"base": None}, corpus(), main="arrow")
    with pytest.raises(ConfigError, match="the adapters of 2 texts, there are 5"):
        evaluate(model, shelf, {"oracle": Oracle(("ada", "bob"))}, corpus())
    with pytest.raises(ConfigError, match="batch_size"):
        read(Contestant.model("base", model), corpus(), batch_size=0)


def test_tables_hold_the_numbers(model, shelf):
    """A row per router with intervals; a row per label with the best in bold; JSON without NaN."""
    found = evaluate(model, shelf, ROUTERS, corpus())
    table = routers_table(found)
    assert [row[0] for row in table.rows] == list(ROUTERS)
    assert table.columns[:5] == ("router", "loss", "difference", "own token", "own text")
    assert table.rows[0][1].startswith(f"{found.loss('spectr').value:.3f} [")
    assert table.rows[0][2] is None
    assert "Compared with `spectr`" in table.headline
    by_label = labels_table(found)
    assert [row[0] for row in by_label.rows] == ["ada", "bob", "cyd", "all text"]
    assert by_label.best == "lowest"
    figures = evaluation_figures(found)
    as_json(figures)
    assert figures["chance"] == pytest.approx(1 / 3, abs=1e-4)
    assert len(figures["routers"]["base"]["losses"]) == len(TEXTS)
    assert figures["routers"]["base"]["own_token"] is None
    assert "model.layers.0" in figures["routers"]["spectr"]["own_by_level"]
    alone = evaluate(model, shelf, {"uniform": Uniform()}, corpus())
    assert [table.title for table in tables(alone)] == ["How the texts are read"]


def test_a_check_for_the_page_has_shares_that_sum_to_one(model, shelf):
    """Of each label; layers in order."""
    check = routing_check(evaluate(model, shelf, ROUTERS, corpus()), "spectr")
    assert check is not None
    assert check.experts == ADAPTERS
    assert all(sum(row) == pytest.approx(1) for row in check.shares.values())
    assert list(check.layers) == ["model.layers.0", "model.layers.1"]
    assert len(check.kinds) == 7
