"""The reference set: built, kept, found again."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from expertmix.bindings.suffix import Suffix
from expertmix.bindings.transformers import TransformersMoE
from expertmix.errors import (
    ConfigError,
    FingerprintError,
    MissingDependencyError,
    ModelError,
    OutputError,
)
from expertmix.optimize import reference_folder
from expertmix.optimize.reference import ReferenceSet
from expertmix.optimize.samples import scores
from expertmix.optimize.start import start
from expertmix.testing import tiny_moe

from .world import FakePathways, open_suffix, samples, topical


class Killed(Exception):  # noqa: N818
    """A run that ends where it must not."""


def same(one: ReferenceSet, other: ReferenceSet) -> None:
    """Two sets hold the same, bit for bit."""
    assert one.meta == other.meta
    assert list(one.samples) == list(other.samples)
    for name in ("embeddings", "start", "mass"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    for a, b in zip(one.logprobs, other.logprobs, strict=True):
        assert torch.equal(a, b)
    for number in range(len(one)):
        left, right = one.state(number), other.state(number)
        assert sorted(left) == sorted(right)
        assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture(scope="module")
def pathways():
    with open_suffix() as opened:
        yield opened


def test_successes_are_kept_in_their_order(pathways):
    """References are the samples whose gold option scores best, with their readings."""
    tried = samples(20)
    readings = pathways.read([sample.question for sample in tried])
    right = [
        number
        for number, (sample, reading) in enumerate(zip(tried, readings, strict=True))
        if int(scores(reading.logprobs[None], [sample]).argmax()) == sample.gold
    ]
    found = ReferenceSet.build(pathways, tried, batch_size=3)
    assert list(found.samples) == [tried[number] for number in right]
    assert (found.meta.tried, found.meta.succeeded) == (20, len(right))
    assert 0 < len(right) < 20
    values, mass = start([readings[number] for number in right], pathways.sites)
    torch.testing.assert_close(found.start, values, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.mass, mass, rtol=0, atol=1e-6)
    for row, number in enumerate(right):
        torch.testing.assert_close(found.embeddings[row], readings[number].mean)
        torch.testing.assert_close(found.logprobs[row], readings[number].logprobs)
        assert sorted(found.state(row)) == sorted(readings[number].state)
    assert found.start.dtype == found.embeddings.dtype == torch.float32


def test_a_reference_can_be_read_again(pathways):
    """Its state gives its log-probabilities once more."""
    found = ReferenceSet.build(pathways, samples(12))
    batch = pathways.batch(
        [sample.question for sample in found.samples],
        [found.state(number) for number in range(len(found))],
    )
    with torch.no_grad():
        again = pathways.score(batch, None)
    for row, logprobs in enumerate(found.logprobs):
        options, width = logprobs.shape
        torch.testing.assert_close(again[row, :options, :width], logprobs, rtol=0, atol=1e-5)


def test_one_option_is_always_a_success(pathways):
    """Free text has nothing to choose from: its answer is the target."""
    tried = samples(4, options=(1,))
    assert len(ReferenceSet.build(pathways, tried)) == 4


def test_saved_and_loaded_it_is_the_same(pathways, tmp_path):
    """Bit for bit, states included; and saved again, from disk, too."""
    built = ReferenceSet.build(pathways, samples(20))
    built.save(tmp_path / "set")
    loaded = ReferenceSet.load(tmp_path / "set")
    same(built, loaded)
    loaded.save(tmp_path / "again")
    same(built, ReferenceSet.load(tmp_path / "again"))


@pytest.mark.parametrize("stop", range(5))
def test_a_killed_build_goes_on(tmp_path, stop):
    """Killed anywhere and called again: the same set, and no finished part is read twice."""
    fake = FakePathways(pull=0.5)
    tried = topical(300)
    whole = ReferenceSet.build(fake, tried)
    passes = fake.passes
    folder = tmp_path / "set"

    def kill(stage: str, done: int, total: int) -> None:
        if done > stop * 64 + 20:
            raise Killed

    fake.passes = 0
    with pytest.raises(Killed):
        ReferenceSet.build(fake, tried, to=folder, progress=kill)
    with pytest.raises(ConfigError, match="not finished"):
        ReferenceSet.load(folder)
    (folder / ".part-00000.safetensors.1.partial").write_bytes(b"half")
    told: list[int] = []
    found = ReferenceSet.build(
        fake, tried, to=folder, progress=lambda stage, done, total: told.append(done)
    )
    same(whole, found)
    assert fake.passes == passes + 2, "the killed part was read anew, no other was"
    assert told[-1] == 300
    assert not list(folder.glob(".*"))
    again = ReferenceSet.build(fake, tried, to=folder)
    same(whole, again)
    assert fake.passes == passes + 2, "a finished set is loaded"


@pytest.mark.parametrize("write", range(6))
def test_a_build_that_is_killed_while_it_writes_goes_on(tmp_path, monkeypatch, write):
    """Also between a part's states and the part itself."""
    fake, tried, folder = FakePathways(pull=0.5), topical(150), tmp_path / "set"
    whole = ReferenceSet.build(fake, tried)
    real, calls = reference_folder.write_rows, []

    def failing(*args):
        calls.append(args)
        if len(calls) > write:
            raise Killed
        return real(*args)

    with monkeypatch.context() as patched:
        patched.setattr(reference_folder, "write_rows", failing)
        with pytest.raises(Killed):
            ReferenceSet.build(fake, tried, to=folder)
    same(whole, ReferenceSet.build(fake, tried, to=folder))


def test_a_folder_of_something_else_is_not_touched(tmp_path):
    """Another build, other files: an error that says so, and nothing is overwritten."""
    fake, tried = FakePathways(), topical(20)
    ReferenceSet.build(fake, tried, to=tmp_path / "set")
    before = {path: path.read_bytes() for path in (tmp_path / "set").iterdir()}
    with pytest.raises(ConfigError, match="another reference set"):
        ReferenceSet.build(fake, tried[1:], to=tmp_path / "set")
    with pytest.raises(ConfigError, match="another reference set"):
        ReferenceSet.build(fake, tried, embedding="last", to=tmp_path / "set")
    with pytest.raises(OutputError, match="exists already"):
        ReferenceSet.load(tmp_path / "set").save(tmp_path / "set")
    assert before == {path: path.read_bytes() for path in (tmp_path / "set").iterdir()}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear reader")
    with pytest.raises(OutputError, match="exists already"):
        ReferenceSet.build(fake, tried, to=tmp_path / "mine")


def test_a_folder_that_cannot_be_read_is_told(tmp_path):
    """No set, a truncated part, a missing one, another format, a broken manifest."""
    folder = tmp_path / "set"
    with pytest.raises(ConfigError, match="holds no reference set"):
        ReferenceSet.load(folder)
    ReferenceSet.build(FakePathways(), topical(20)).save(folder)
    part, manifest = folder / "part-00000.safetensors", folder / "manifest.json"
    whole, text = part.read_bytes(), manifest.read_text()
    part.write_bytes(whole[:-50])
    with pytest.raises(ConfigError, match="cannot read"):
        ReferenceSet.load(folder)
    part.unlink()
    with pytest.raises(ConfigError, match="cannot read"):
        ReferenceSet.load(folder)
    part.write_bytes(whole)
    manifest.write_text(text.replace('"version": 1', '"version": 9'))
    with pytest.raises(ConfigError, match="format 9"):
        ReferenceSet.load(folder)
    manifest.write_text("{")
    with pytest.raises(ConfigError, match="cannot read"):
        ReferenceSet.load(folder)
    data = json.loads(text)
    data["meta"]["succeeded"] += 1
    manifest.write_text(json.dumps(data))
    with pytest.raises(ConfigError, match="references, its manifest says"):
        ReferenceSet.load(folder)


def test_without_states_neighbors_are_read_again(pathways, tmp_path):
    """A small folder: states come from one more pass, and are the same to rounding."""
    tried = samples(20)
    full = ReferenceSet.build(pathways, tried, to=tmp_path / "full")
    small = ReferenceSet.build(pathways, tried, to=tmp_path / "small", states=False)
    assert not list((tmp_path / "small").glob("states-*"))
    with pytest.raises(ConfigError, match="keeps no states"):
        small.state(0)
    bound = small.bound(pathways)
    bound.prefetch(range(len(bound)))
    for number in range(len(full)):
        for name, tensor in full.state(number).items():
            torch.testing.assert_close(bound.state(number)[name], tensor, rtol=1e-4, atol=1e-5)


def test_a_set_of_another_model_is_refused(pathways):
    """Other weights, other layers, other decision tokens: never used in silence."""
    found = ReferenceSet.build(pathways, samples(12))
    found.check(pathways)
    other = TransformersMoE(tiny_moe("olmoe", seed=1))
    with pytest.raises(FingerprintError, match="another model"):
        found.check(Suffix(other, other.blocks[-2:]))
    for layers, decisions, words in ((3, 1, "critical sites"), (2, 2, "decision tokens")):
        wrong = Suffix(pathways.moe, pathways.moe.blocks[-layers:], decisions=decisions)
        with pytest.raises(ConfigError, match=words):
            found.bound(wrong)


def test_embeddings_are_of_any_kind(pathways, tmp_path):
    """Last, mean, given vectors, a function of texts; samples are embedded as references were."""
    tried = [replace(sample, text=f"text {number}") for number, sample in enumerate(samples(12))]
    readings = pathways.read([sample.question for sample in tried])
    last = ReferenceSet.build(pathways, tried, embedding="last", batch_size=12)
    torch.testing.assert_close(
        last.embeddings, last.embed(readings)[[tried.index(one) for one in last.samples]],
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip
    vectors = torch.randn(12, 3)
    given = ReferenceSet.build(pathways, tried, embedding=vectors)
    kept = [tried.index(one) for one in given.samples]
    assert torch.equal(given.embeddings, vectors[kept])
    with pytest.raises(ConfigError, match="were given"):
        given.embed(readings, tried)

    def lengths(texts):
        return torch.tensor([[len(text), 1.0] for text in texts])

    made = ReferenceSet.build(pathways, tried, embedding=lengths, to=tmp_path / "set")
    assert made.meta.embedding == "given"
    assert torch.equal(made.embed(readings, tried), lengths([one.text for one in tried]))
    loaded = ReferenceSet.load(tmp_path / "set", embedding=lengths)
    assert torch.equal(loaded.embed(readings, tried), made.embed(readings, tried))
    with pytest.raises(ConfigError, match="pass the 12 samples"):
        made.embed(readings)
    with pytest.raises(ConfigError, match="has no text"):
        ReferenceSet.build(pathways, samples(12), embedding=lengths)


def test_sentence_transformers_are_optional(pathways, monkeypatch):
    """With the package its vectors are used; without, the error says what to install."""
    tried = [replace(sample, text="a" * number) for number, sample in enumerate(samples(12))]
    name = "sentence-transformers:tiny"
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(MissingDependencyError, match="pip install sentence-transformers"):
        ReferenceSet.build(pathways, tried, embedding=name)

    class Encoder:
        def __init__(self, name):
            assert name == "tiny"

        def encode(self, texts, show_progress_bar):
            return np.array([[len(text), 1] for text in texts], dtype=np.float32)

    package = SimpleNamespace(SentenceTransformer=Encoder)
    monkeypatch.setitem(sys.modules, "sentence_transformers", package)
    found = ReferenceSet.build(pathways, tried, embedding=name)
    lengths = [float(len(sample.text)) for sample in found.samples]
    assert found.embeddings[:, 0].tolist() == lengths


def test_impossible_builds_are_told(pathways):
    """No samples, no gold, no successes, strange embeddings, values that are not finite."""
    tried = samples(6)
    with pytest.raises(ConfigError, match="no samples"):
        ReferenceSet.build(pathways, [])
    with pytest.raises(ConfigError, match="'s0-3' has no right option"):
        ReferenceSet.build(pathways, [*tried[:3], replace(tried[3], gold=None)])
    with pytest.raises(ConfigError, match="unknown embedding"):
        ReferenceSet.build(pathways, tried, embedding="middle")
    with pytest.raises(ConfigError, match=r"must be \(6, width\)"):
        ReferenceSet.build(pathways, tried, embedding=torch.zeros(5, 2))
    with pytest.raises(ConfigError, match="batch_size=0"):
        ReferenceSet.build(pathways, tried, batch_size=0)
    readings = pathways.read([sample.question for sample in tried])
    wrong = [
        replace(one, gold=int(scores(reading.logprobs[None], [one]).argmin()))
        for one, reading in zip(tried, readings, strict=True)
    ]
    with pytest.raises(ConfigError, match=r"none of 6 samples right \(accuracy 0 %\)"):
        ReferenceSet.build(pathways, wrong)
    holes = torch.full((6, 2), torch.nan)
    with pytest.raises(ConfigError, match=r"'s0-\d': its embedding \(given\) is not finite"):
        ReferenceSet.build(pathways, tried, embedding=holes)
    with pytest.raises(ModelError, match="'t0-1': the model's log-probabilities are not finite"):
        ReferenceSet.build(FakePathways(unreadable=[6]), topical(3))


def test_shuffled_labels_are_a_permutation_among_equals(pathways):
    """Only gold changes, among samples with as many options, the same for the same seed."""
    found = ReferenceSet.build(pathways, samples(60))
    shuffled = found.shuffled_labels(1)
    assert [one.question for one in shuffled.samples] == [one.question for one in found.samples]
    for count in (2, 3, 4):
        golds = [
            sorted(s.gold for s in one.samples if len(s.question.options) == count)
            for one in (found, shuffled)
        ]
        assert golds[0] == golds[1]
    gold = [one.gold for one in shuffled.samples]
    assert gold != [one.gold for one in found.samples]
    assert gold == [one.gold for one in found.shuffled_labels(1).samples]
    assert gold != [one.gold for one in found.shuffled_labels(2).samples]
    assert torch.equal(shuffled.embeddings, found.embeddings)


def test_a_subset_keeps_rows_together(pathways, tmp_path):
    """All of a reference moves to its new number; it can be saved."""
    found = ReferenceSet.build(pathways, samples(30))
    part = found.subset([4, 1])
    assert list(part.samples) == [found.samples[4], found.samples[1]]
    assert torch.equal(part.start, found.start[[4, 1]])
    assert torch.equal(part.state(1)["hidden"], found.state(1)["hidden"])
    part.save(tmp_path / "part")
    same(part, ReferenceSet.load(tmp_path / "part"))


def test_another_function_of_texts_does_not_get_the_embeddings_of_the_first(tmp_path):
    """A finished folder is loaded for the function that made it, and for no other."""
    fake = FakePathways(pull=1.0)
    known = [replace(one, text=f"text {number}") for number, one in enumerate(topical(6))]

    def lengths(texts):
        return torch.tensor([[float(len(text)), 1.0] for text in texts])

    first = ReferenceSet.build(fake, known, embedding=lengths, to=tmp_path / "set")
    again = ReferenceSet.build(fake, known, embedding=lengths, to=tmp_path / "set")
    assert again.digest == first.digest
    for other in (lambda texts: lengths(texts) * 2, lambda texts: lengths(texts)[:, :1]):
        with pytest.raises(ConfigError, match="another function"):
            ReferenceSet.build(fake, known, embedding=other, to=tmp_path / "set")
