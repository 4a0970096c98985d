"""Models unlike the usual: other caches, two texts, modules that are not called as usual."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

import expertmix as em
from expertmix.errors import UnsupportedModelError, UnsupportedRuntimeError
from expertmix.experts.lora import Adapter, Factors
from expertmix.experts.places import features
from expertmix.experts.shelf import Shelf
from expertmix.routers.pooled import Pooled
from expertmix.testing import tiny_lm

from .world import IDS, close, logits_of, tiny_llama

LONG = torch.randint(3, 32, (2, 40), generator=torch.Generator().manual_seed(8))


def shelf_for(model: Any, ends: Sequence[str]) -> Shelf:
    """Three weak adapters on the linear modules whose names end so."""

    def factors(shape: tuple[int, int], generator: torch.Generator) -> Factors:
        out, width = shape
        down = torch.randn(3, width, generator=generator) / width**0.5
        return Factors(down, torch.randn(out, 3, generator=generator) / out**0.5, 0.3)

    adapters = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        found = {
            path: factors(shape, generator)
            for path, module in model.named_modules()
            if path.endswith(tuple(ends)) and (shape := features(module)) is not None
        }
        adapters.append(Adapter(f"a{seed}", found))
    return Shelf.of(adapters)


def t5() -> Any:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=32, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, pad_token_id=0,
        eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).train(False)


@pytest.mark.parametrize("kind", ["mistral", "gemma3_text", "qwen3_next", "minimax", "lfm2"])
def test_the_default_router_decodes_as_it_reads(kind):
    """Sliding windows, linear attention and caches of another kind: pieces are as the whole."""
    model = tiny_lm(kind)
    em.compose(model, shelf_for(model, ("q_proj", "v_proj", "o_proj", "in_proj")))
    with torch.no_grad():
        first = model(LONG[:, :20], use_cache=True)
        cache, parts = first.past_key_values, [first.logits]
        for part in LONG[:, 20:].split([1, 1, 18], 1):
            parts.append(model(part, use_cache=True, cache=cache).logits)
    close(torch.cat(parts, 1), logits_of(model, LONG))


def test_an_encoder_with_a_decoder():
    """Two texts in one pass: routed without a memory, never pooled or recorded under one name."""
    shelf = shelf_for(t5(), ("q", "v"))
    for calibration in ("own", [IDS], None):
        with pytest.raises(UnsupportedModelError, match="two texts"):
            em.compose(t5(), shelf, calibration=calibration)
    model = em.compose(t5(), shelf, "spectr")
    assert model.generate(IDS, max_new_tokens=3).shape[0] == 2
    with pytest.raises(UnsupportedModelError, match="recording"), em.record(model):
        model(input_ids=IDS, decoder_input_ids=IDS)
    with pytest.raises(UnsupportedModelError, match="Pooled"):
        em.Composed.of(model).change(router=Pooled())
    logits_of(model, IDS, decoder_input_ids=IDS)


def test_a_head_that_reads_the_last_token_only():
    """Pooled cannot tell which token a head reads in `generate`, and names the module."""
    model = tiny_llama()
    em.compose(model, shelf_for(model, ("lm_head", "q_proj")))
    assert torch.isfinite(logits_of(model)).all()
    with pytest.raises(UnsupportedRuntimeError, match="'lm_head' reads 2 tokens"):
        model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=2)
    em.compose(model, em.Composed.of(model).plan.shelf, "spectr")
    model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=2)


def test_a_module_that_the_model_never_calls():
    """An adapter on weights that are used without their module would be ignored: it is named."""
    model = tiny_lm("jamba")
    with pytest.raises(UnsupportedModelError, match=r"dt_proj' did not run"):
        em.compose(model, shelf_for(model, ("dt_proj", "q_proj")))


def test_a_module_that_gives_no_tensor():
    """A router that returns a tuple cannot be added to: named, and gone with `uninstall`."""
    model = tiny_lm("llama4_text")
    before = logits_of(model)
    em.compose(model, shelf_for(model, ("router",)), "spectr")
    with pytest.raises(UnsupportedModelError, match=r"router' gives a tuple"):
        model(IDS)
    em.Composed.of(model).uninstall()
    assert torch.equal(logits_of(model), before)


def test_a_cache_that_counts_no_tokens():
    """A model without attention decodes under a router without memory; pooled says why not."""
    model = tiny_lm("mamba")
    shelf = shelf_for(model, ("in_proj",))
    ids = IDS[:1]
    em.compose(model, shelf)
    with pytest.raises(UnsupportedRuntimeError, match="without a place for each token"):
        model.generate(ids, max_new_tokens=3)
    em.compose(model, shelf, "spectr")
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] <= 12
