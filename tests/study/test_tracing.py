from __future__ import annotations

import math

import pytest
import torch

import expertmix as em
from expertmix.errors import ConfigError, NoSitesError, UnknownExpertError
from expertmix.study.corpus import encode
from expertmix.study.prompts import Prompt
from expertmix.study.tracing import Keep, run
from expertmix.testing import tiny_moe, tiny_tokenizer

TEXTS = ("a long text that needs padding nowhere", "short", "of middle length", "z", "another one")
LABELS = ("x", "y", "x", "y", "x")


@pytest.fixture(scope="module")
def model():
    return tiny_moe()


@pytest.fixture(scope="module")
def corpus():
    prompts = [Prompt(text, label) for text, label in zip(TEXTS, LABELS, strict=True)]
    return encode(prompts, tiny_tokenizer(), context=None)


def test_the_loss_is_the_models_own(model, corpus):
    """A sample's loss is what transformers computes for it alone; padding changes nothing."""
    found = run(model, corpus, batch_size=3)
    for sample, loss in zip(corpus.samples, found.losses, strict=True):
        ids = torch.tensor([sample.ids])
        alone = model(ids, labels=ids).loss.item() if len(sample.ids) > 1 else math.nan
        assert loss == pytest.approx(alone, abs=1e-5, nan_ok=True)


def test_neither_batches_nor_order_change_a_loss(model, corpus):
    """Sorted by length or not, one by one or together; losses keep the corpus's order."""
    expected = pytest.approx(run(model, corpus, batch_size=1).losses, abs=1e-5, nan_ok=True)
    assert run(model, corpus, batch_size=2).losses == expected
    assert run(model, corpus, batch_size=2, by_length=True).losses == expected


def test_a_mean_counts_every_predicted_token_once(model, corpus):
    """The loss of a label is the mean over its tokens, not over its samples."""
    found = run(model, corpus)
    weights = [len(sample.ids) - 1 for sample in corpus.samples]
    kept = [n for n, label in enumerate(LABELS) if label == "x"]
    mean = sum(weights[n] * found.losses[n] for n in kept) / sum(weights[n] for n in kept)
    assert found.loss("x") == pytest.approx(mean)
    assert found.by_label() == {"x": found.loss("x"), "y": found.loss("y")}
    assert math.isnan(found.loss("nobody's"))


def test_a_kept_run_has_a_trace_in_the_order_of_the_corpus(model, corpus, tmp_path):
    """One sample per prompt, with its label, in memory and in a file; recording changes no loss."""
    plain = run(model, corpus, batch_size=2)
    kept = run(model, corpus, batch_size=2, keep=Keep(to=tmp_path / "t.parquet"))
    assert kept.losses == pytest.approx(plain.losses, nan_ok=True, abs=0)
    assert plain.trace is None
    trace = em.Trace.load(tmp_path / "t.parquet")
    real = trace.tokens.real
    assert trace.labels == dict(enumerate(LABELS))
    assert trace.text is None
    for number, sample in enumerate(corpus.samples):
        mine = real & (trace.tokens.sample == number)
        assert tuple(trace.tokens.token_id[mine].tolist()) == sample.ids


def test_text_is_kept_only_when_asked_for(model, corpus):
    """With a tokenizer the trace has token strings."""
    kept = run(model, corpus, batch_size=1, keep=Keep(tokenizer=tiny_tokenizer()))
    assert kept.trace.text[:6] == tuple("a long")


def test_edits_act_on_every_batch(model, corpus):
    """The loss with an edit is that of the edited model."""
    edit = em.Ablate("*", (0, 1, 2))
    found = run(model, corpus, edit, batch_size=2)
    sample = torch.tensor([corpus.samples[-1].ids])
    with em.record(model, edit):
        assert found.losses[-1] == pytest.approx(model(sample, labels=sample).loss.item(), abs=1e-5)


def test_a_dense_model_runs_but_cannot_be_recorded(corpus):
    """The base of a comparison takes the same path."""
    dense = tiny_moe("llama")
    assert math.isfinite(run(dense, corpus).loss())
    with pytest.raises(NoSitesError):
        run(dense, corpus, keep=Keep())


def test_progress_counts_samples(model, corpus):
    """It starts at zero and ends at all of them."""
    seen = []
    run(model, corpus, batch_size=2, progress=lambda *step: seen.append(step), stage="now")
    assert seen == [("now", done, 5) for done in (0, 2, 4, 5)]


def test_what_is_wrong_is_told_before_anything_runs(model, corpus, tmp_path):
    """No trace file is left."""
    seen = []
    with pytest.raises(UnknownExpertError):
        run(
            model, corpus, em.Ablate("*", (99,)), keep=Keep(to=tmp_path / "t.parquet"),
            progress=lambda stage, done, total: seen.append(done),
        )  # fmt: skip
    with pytest.raises(ConfigError, match="batch_size"):
        run(model, corpus, batch_size=0, keep=Keep(to=tmp_path / "t.parquet"))
    assert seen == [0]
    assert not list(tmp_path.iterdir())
