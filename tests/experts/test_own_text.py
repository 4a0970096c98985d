"""What a model writes by itself, whatever its family."""

from __future__ import annotations

import pytest
import torch

from expertmix.errors import UnsupportedModelError
from expertmix.experts.own_text import own_text
from expertmix.testing import tiny_lm

from .world import VOCAB, tiny_llama


def test_own_text_is_the_models_and_repeatable():
    """Token ids of its vocabulary, the same for the same seed, in the shape asked for."""
    model = tiny_llama()
    text = own_text(model, rows=3, columns=7)
    assert text.shape == (3, 7)
    assert int(text.min()) >= 0
    assert int(text.max()) < VOCAB
    assert torch.equal(text, own_text(model, rows=3, columns=7))
    assert not torch.equal(text, own_text(model, rows=3, columns=7, seed=1))
    assert (text[:, 0] == model.config.bos_token_id).all()


def test_without_a_first_token_texts_begin_at_random():
    """A model that names none starts from tokens of its vocabulary."""
    text = own_text(tiny_llama(bos_token_id=None), rows=8, columns=3)
    assert len(text[:, 0].unique()) > 1
    assert int(text.max()) < VOCAB


@pytest.mark.parametrize("kind", ["minimax", "rwkv", "mamba"])
def test_the_cache_is_the_models_own(kind):
    """One with a cache of its own kind writes, and so does one without any."""
    text = own_text(tiny_lm(kind), rows=2, columns=5)
    assert text.shape == (2, 5)


def test_with_a_cache_or_without_it_is_the_same_text():
    """Reading all of it again at each token gives what the cache gives."""
    model, without = tiny_llama(), tiny_llama()
    real = without.forward
    without.forward = lambda *args, use_cache, **given: real(*args, use_cache=False, **given)
    assert torch.equal(own_text(model, columns=6), own_text(without, columns=6))


def test_a_model_that_gives_no_numbers_is_told():
    """NaN logits are a typed error, before anything is sampled from them."""
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(UnsupportedModelError, match="NaN"):
        own_text(model)
