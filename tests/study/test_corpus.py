from __future__ import annotations

import pytest

from expertmix.errors import ConfigError, ContextLengthError
from expertmix.study.corpus import encode
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
