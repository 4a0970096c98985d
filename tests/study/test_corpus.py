from __future__ import annotations

import pytest

from expertmix.errors import ConfigError, ContextLengthError
from expertmix.study.corpus import Corpus, Sample, encode, encode_chat
from expertmix.study.prompts import Prompt
from expertmix.testing import tiny_tokenizer

PROMPTS = (Prompt("abc", "x", "p:1"), Prompt("abcdef", "y", "p:2"), Prompt("ab", "x", "p:3"))


def test_texts_that_fit_are_kept_whole():
    """A text as long as the context fits; without a context everything does."""
    assert encode(PROMPTS, tiny_tokenizer(), context=6).tokens == 11
    assert encode(PROMPTS, tiny_tokenizer(), context=None).tokens == 11


def test_a_text_longer_than_the_context_is_refused():
    """The message names the prompt, both lengths, and the way out."""
    with pytest.raises(
        ContextLengthError, match=r"p:2: the text has 6 tokens, the model reads 5.*--truncate"
    ):
        encode(PROMPTS, tiny_tokenizer(), context=5)


def test_truncation_is_asked_for_and_told():
    """The end is cut, and the sample says by how much."""
    corpus = encode(PROMPTS, tiny_tokenizer(), context=5, truncate=True)
    assert [sample.cut for sample in corpus.samples] == [0, 1, 0]
    assert corpus.truncated == 1
    assert corpus.samples[1].ids == encode(PROMPTS, tiny_tokenizer(), context=6).samples[1].ids[:5]


def test_a_text_without_tokens_is_refused():
    """Nothing could be recorded for it."""
    with pytest.raises(ConfigError, match="p:1: the tokenizer makes no token"):
        encode([Prompt("", None, "p:1")], tiny_tokenizer(), context=5)


def test_samples_are_found_by_label():
    """Labels keep their order; `first` takes a few of each."""
    corpus = encode(PROMPTS, tiny_tokenizer(), context=None)
    assert corpus.labels == ("x", "y")
    assert [sample.where for sample in corpus.labeled("x").samples] == ["p:1", "p:3"]
    assert [sample.where for sample in corpus.first(1).samples] == ["p:1", "p:2"]


def test_either_all_samples_have_a_label_or_none_has():
    """Beside labels, a text without one is `unlabeled`: in losses and in the trace alike."""
    mixed = encode((*PROMPTS, Prompt("a", None, "p:4")), tiny_tokenizer(), context=None)
    assert mixed.labels == ("x", "y", "unlabeled")
    bare = encode([Prompt("a", None, "p:1")], tiny_tokenizer(), context=None)
    assert bare.labels == ()


def test_a_chat_has_the_labels_of_its_text():
    """Also beside prompts without one."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    mixed = (*PROMPTS, Prompt("a", None, "p:4"))
    chat, text = encode_chat(mixed, tokenizer), encode(mixed, tokenizer, context=None)
    assert [one.label for one in chat.samples] == [one.label for one in text.samples]


def test_a_few_varied_samples_are_of_all_labels():
    """One of each before a second one of any, in the order of the corpus."""
    labels = ("x", "x", "x", "y", "z", "y")
    corpus = Corpus(tuple(Sample((1,), label, "p") for label in labels))
    assert corpus.varied(3) == (0, 3, 4)
    assert corpus.varied(5) == (0, 1, 3, 4, 5)
    assert corpus.varied(9) == tuple(range(6))
    assert Corpus(tuple(Sample((1,), None, "p") for _ in range(4))).varied(2) == (0, 1)
