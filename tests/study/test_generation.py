"""Answers, and the adapters that made each token."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import expertmix as em
from expertmix.attribute.modules import mean_weights
from expertmix.errors import CheckpointError, ConfigError, ContextLengthError
from expertmix.experts.composed import Composed
from expertmix.experts.peft_folder import read_adapter
from expertmix.experts.shelf import Shelf
from expertmix.routers.fixed import Fixed
from expertmix.routers.oracle import Oracle
from expertmix.routers.spectr import SpectR
from expertmix.routers.uniform import Uniform
from expertmix.study.corpus import Corpus, Sample, encode, encode_chat
from expertmix.study.generation import Decoding, generate
from expertmix.study.loading import load_model, load_tokenizer
from expertmix.study.prompts import Prompt

TEXTS = ("one and two", "a longer line of text", "x")


@pytest.fixture
def tokenizer(base):
    return load_tokenizer(str(base))


@pytest.fixture
def corpus(tokenizer):
    prompts = [Prompt(text, f"label {n}", f"f:{n}") for n, text in enumerate(TEXTS)]
    return encode(prompts, tokenizer, context=None)


@pytest.fixture
def composed(base, library):
    model = load_model(str(base), device="cpu")
    with Composed(model, Shelf.open(library), SpectR(top_k=1)) as found:
        yield found


def one_by_one(composed, sample, new: int, ends: set[int]) -> list[int]:
    """Greedy decoding of one row without cache and padding."""
    ids = list(sample.ids)
    for _ in range(new):
        with torch.inference_mode():
            logits = composed.model(torch.tensor([ids]), use_cache=False).logits
        following = int(logits[0, -1].argmax())
        if following in ends:
            break
        ids.append(following)
    return ids[len(sample.ids) :]


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_an_answer_is_what_greedy_decoding_gives(composed, corpus, tokenizer, batch_size):
    """Row by row, whatever else is in the batch, up to the token that ends it."""
    answers = generate(composed, corpus, tokenizer, Decoding(8), batch_size=batch_size)
    for answer, sample in zip(answers, corpus.samples, strict=True):
        assert answer.prompt is sample
        assert list(answer.ids) == one_by_one(composed, sample, 8, {2})
        assert answer.text == tokenizer.decode(list(answer.ids))
        assert len(answer.pieces) == len(answer.ids) == len(answer.weights)


def test_the_adapters_of_a_token_are_those_where_it_was_made(composed, corpus, tokenizer):
    """The decisions of the token before it, over all sites, as one pass over the text has them."""
    answers = generate(composed, corpus, tokenizer, Decoding(6), detail=range(3), batch_size=3)
    for answer in answers:
        ids = [*answer.prompt.ids, *answer.ids]
        with em.record(composed) as trace, torch.inference_mode():
            composed.model(torch.tensor([ids]))
        (chunk,) = trace.chunks()
        whole = mean_weights(chunk.decisions, trace.sites)
        start = len(answer.prompt.ids) - 1
        torch.testing.assert_close(answer.weights, whole[start : start + len(answer.ids)])
        assert answer.made is not None
        assert answer.made.tokens.token_id.tolist() == list(answer.ids)
        assert answer.made.tokens.position.tolist() == [
            start + 1 + step for step in range(len(answer.ids))
        ]
        best = answer.weights.argmax(1).tolist()
        assert all(mine in (None, one) for mine, one in zip(answer.first, best, strict=True))
        assert float(answer.shares.sum()) == pytest.approx(1)


def test_what_follows_an_end_is_left_out(composed, corpus, tokenizer):
    """A row that ends early is not recorded on, though the batch goes on."""
    free = generate(composed, corpus, tokenizer, Decoding(8), batch_size=3)
    end = free[1].ids[2]  # let this token end answers
    composed.model.generation_config.eos_token_id = [2, end]
    kept = []
    cut = generate(
        composed, corpus, tokenizer, Decoding(8), batch_size=3,
        keep=lambda meta, chunk: kept.append(chunk),
    )  # fmt: skip
    for before, after in zip(free, cut, strict=True):
        expected = before.ids[: before.ids.index(end)] if end in before.ids else before.ids
        assert after.ids == expected
    (chunk,) = kept
    assert chunk.tokens.real.all()
    assert chunk.tokens.sample.tolist() == sorted(chunk.tokens.sample.tolist())
    for number, answer in enumerate(cut):
        mine = chunk.tokens.position[chunk.tokens.sample == number].tolist()
        read = len(answer.prompt.ids) + len(answer.ids)
        last = read - (len(answer.ids) == 8)  # the last token of a full answer is never read
        assert mine == list(range(last))


def test_batches_are_kept_as_one_trace(composed, corpus, tokenizer):
    """Samples are numbered through, with their labels and words."""
    kept = []
    generate(
        composed, corpus, tokenizer, Decoding(2), batch_size=2,
        keep=lambda meta, chunk: kept.append((meta, chunk)),
    )  # fmt: skip
    samples = [number for _, chunk in kept for number in chunk.tokens.sample.unique().tolist()]
    assert samples == [0, 1, 2]
    assert kept[1][1].labels == {2: "label 2"}
    assert kept[0][1].text[:3] == ("o", "n", "e")
    assert kept[0][0].sites == kept[1][0].sites


def test_an_oracle_is_told_whose_prompt_comes(base, library, corpus, tokenizer):
    """Batch by batch."""
    told = ("bob", "ada", "cyd")
    model = load_model(str(base), device="cpu")
    with Composed(model, Shelf.open(library), Oracle(told[:1])) as composed:
        answers = generate(composed, corpus, tokenizer, Decoding(3), told=told, batch_size=2)
    for answer, name in zip(answers, told, strict=True):
        share = answer.shares.tolist()
        assert share[("ada", "bob", "cyd").index(name)] == 1


def test_adapters_that_tie_have_no_first(base, library, corpus, tokenizer):
    """No number would be right."""
    model = load_model(str(base), device="cpu")
    both = [library / "ada", library / "ada"]
    shelf = Shelf.of(read_adapter(path, name) for path, name in zip(both, "ab", strict=True))
    with Composed(model, shelf, Uniform()) as composed:
        answers = generate(composed, corpus, tokenizer, Decoding(3))
    assert {first for answer in answers for first in answer.first} == {None}
    with Composed(model, shelf, Fixed({"a": 0.4, "b": 0.6})) as composed:
        answers = generate(composed, corpus, tokenizer, Decoding(3))
    assert {first for answer in answers for first in answer.first} == {1}
    assert answers[0].shares.tolist() == pytest.approx([0.4, 0.6])


def test_drawing_is_seeded_and_leaves_the_generator_alone(composed, corpus, tokenizer):
    """The same seed, the same answers; another one, others."""
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    first, again, other = (
        [answer.ids for answer in generate(composed, corpus, tokenizer, Decoding(8, 1.5, seed))]
        for seed in (0, 0, 1)
    )
    assert first == again != other
    assert torch.equal(torch.rand(1), expected)


def test_what_a_model_says_of_sampling_does_not_count(composed, corpus, tokenizer):
    """Hub models often come with a temperature of their own."""
    plain = generate(composed, corpus, tokenizer, Decoding(5))
    config = composed.model.generation_config
    config.do_sample, config.temperature, config.top_p, config.top_k = True, 5.0, 0.1, 3
    again = generate(composed, corpus, tokenizer, Decoding(5))
    assert [answer.ids for answer in plain] == [answer.ids for answer in again]


def test_a_prompt_that_leaves_no_room_is_refused(corpus):
    """Before anything runs; so are lengths and temperatures that cannot be."""
    Decoding(107).check(corpus, 128)
    with pytest.raises(ContextLengthError, match="f:1: a prompt of 21 tokens and an answer of 108"):
        Decoding(108).check(corpus, 128)
    Decoding(10_000).check(corpus, None)
    with pytest.raises(ConfigError, match="max_new_tokens"):
        Decoding(0)
    with pytest.raises(ConfigError, match="temperature"):
        Decoding(temperature=-1)


def test_a_chat_wraps_the_prompt(tokenizer):
    """In the tokenizer's template, up to where the answer begins; without one it is refused."""
    (sample,) = encode_chat([Prompt("hi", "a", "f:1")], tokenizer).samples
    assert tokenizer.decode(list(sample.ids)) == "<hi>:"
    assert (sample.label, sample.where) == ("a", "f:1")
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="no chat template"):
        encode_chat([Prompt("hi")], tokenizer)


def test_weights_that_overflow_are_told(base, library, corpus, tokenizer, tmp_path):
    """An adapter that is far too large makes no answer that looks like one."""
    copied = shutil.copytree(library, tmp_path / "library")
    file = copied / "ada" / "adapter_model.safetensors"
    save_file({key: value * 1e30 for key, value in load_file(file).items()}, file)
    model = load_model(str(base), device="cpu")
    with (
        Composed(model, Shelf.open(copied), SpectR(weights="softmax")) as composed,
        pytest.raises(CheckpointError, match=r"f:0: the weights .* no longer numbers"),
    ):
        generate(composed, corpus, tokenizer, Decoding(2))


def test_a_prompt_that_was_cut_is_too_long():
    """Its whole length counts, and is told."""
    cut = Corpus((Sample((1, 2, 3), None, "f:1", cut=97),))
    with pytest.raises(ContextLengthError, match="f:1: a prompt of 100 tokens and an answer of 4"):
        Decoding(4).check(cut, 64)
