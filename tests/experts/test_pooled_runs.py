"""A router that remembers, in all the ways in which a model decodes."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, StaticCache

from expertmix.core.record import record
from expertmix.errors import UnsupportedRuntimeError
from expertmix.experts.compose import ready
from expertmix.experts.composed import Composed
from expertmix.experts.shelf import Shelf
from expertmix.routers.fixed import Fixed
from expertmix.routers.pooled import Pooled

from .world import IDS, VOCAB, close, logits_of, tiny_llama

ROUTER = Pooled(top_k=2, temperature=0.5)
LONG = torch.randint(3, VOCAB, (2, 45), generator=torch.Generator().manual_seed(8))


@pytest.fixture
def composed(library: Path) -> Iterator[Composed]:
    model, shelf = tiny_llama(), Shelf.open(library)
    with Composed(model, shelf, ready(model, shelf, ROUTER)) as made:
        yield made


def weights_of(composed: Composed, run) -> torch.Tensor:
    """(sites, samples, tokens, E) of all recorded weights."""
    with record(composed) as trace, torch.no_grad():
        run()
    return torch.stack([trace[site].dense() for site in trace.sites])


@torch.no_grad()
def step_by_step(model, ids, cache, **inputs) -> torch.Tensor:
    """Logits of a cached decoding."""
    parts = [
        model(ids[:, i : i + 1], cache=cache, use_cache=True, **inputs).logits
        for i in range(ids.shape[1])
    ]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("kind", ["dynamic", "static", "lazy"])
def test_decoding_gathers_what_a_prefill_gathers(composed, kind):
    """Token by token with any cache, the logits are those of one pass."""
    config = composed.model.config
    cache = {
        "dynamic": lambda: DynamicCache(config=config),
        "static": lambda: StaticCache(config=config, max_cache_len=64),
        "lazy": DynamicCache,
    }[kind]()
    close(step_by_step(composed.model, LONG, cache), logits_of(composed.model, LONG))


def test_chunks_of_any_length_give_the_same(composed):
    """A prefill in pieces, then steps."""
    cache = DynamicCache(config=composed.model.config)
    with torch.no_grad():
        parts = [
            composed.model(part, cache=cache, use_cache=True).logits
            for part in LONG.split([20, 1, 1, 13, 10], 1)
        ]
    close(torch.cat(parts, 1), logits_of(composed.model, LONG))


def test_a_cache_that_the_model_made_itself(composed):
    """It comes with the first output, and goes on."""
    with torch.no_grad():
        first = composed.model(LONG[:, :20], use_cache=True)
        then = composed.model(LONG[:, 20:], cache=first.past_key_values, use_cache=True)
    close(then.logits, logits_of(composed.model, LONG)[:, 20:])


def test_history_matters(composed):
    """The same tokens after another beginning are routed otherwise: it does remember."""
    other = torch.cat([LONG[:, :30].flip(1), LONG[:, 30:]], 1)
    first = weights_of(composed, lambda: composed.model(LONG)).view(14, 2, 45, 5)
    second = weights_of(composed, lambda: composed.model(other)).view(14, 2, 45, 5)
    assert not torch.allclose(first[0, :, 31], second[0, :, 31], atol=1e-3)


def test_padding_is_no_evidence(composed):
    """Left padding changes no decision for the real tokens."""
    padded = torch.cat([torch.zeros(2, 6, dtype=torch.int64), IDS], 1)
    mask = (torch.arange(15) >= 6).expand(2, 15).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        found = composed.model(padded, attention_mask=mask, position_ids=positions).logits[:, 6:]
    close(found, logits_of(composed.model))
    cache = DynamicCache(config=composed.model.config)
    with torch.no_grad():
        composed.model(
            padded[:, :12], attention_mask=mask[:, :12], position_ids=positions[:, :12], cache=cache
        )
        last = composed.model(
            padded[:, 12:], attention_mask=mask, position_ids=positions[:, 12:], cache=cache
        )
    close(last.logits, logits_of(composed.model)[:, 6:])


def test_beams_keep_their_own_evidence(composed):
    """Beam search with a cache writes what it writes without one."""
    settings = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False}
    mask = torch.ones_like(IDS)
    with_cache = composed.model.generate(IDS, attention_mask=mask, **settings)
    without = composed.model.generate(IDS, attention_mask=mask, use_cache=False, **settings)
    assert torch.equal(with_cache, without)


def test_speculative_decoding_goes_back_with_its_cache(composed):
    """An assistant's rejected tokens leave no evidence: the text is the greedy one."""
    settings = {"max_new_tokens": 12, "do_sample": False}
    one, mask = IDS[:1], torch.ones_like(IDS[:1])
    plain = composed.model.generate(one, attention_mask=mask, **settings)
    helped = composed.model.generate(
        one, attention_mask=mask, assistant_model=tiny_llama(3), **settings
    )
    assert torch.equal(plain, helped)


def test_a_cache_that_was_cut_too_far_is_refused(composed):
    """Beyond what is kept, the router says that it cannot go on."""
    cache = DynamicCache(config=composed.model.config)
    with torch.no_grad():
        composed.model(LONG, cache=cache, use_cache=True)
        cache.crop(-40)
        with pytest.raises(UnsupportedRuntimeError, match="cut back"):
            composed.model(LONG[:, 5:], cache=cache, use_cache=True)
        cache.reset()
        close(
            composed.model(IDS, cache=DynamicCache(), use_cache=True).logits,
            logits_of(composed.model),
        )


def test_a_copied_cache_goes_its_own_way(composed):
    """Two continuations of one prefix do not see each other."""
    cache = DynamicCache(config=composed.model.config)
    with torch.no_grad():
        composed.model(LONG[:, :20], cache=cache, use_cache=True)
        twin = copy.deepcopy(cache)
        composed.model(LONG[:, :9], cache=twin, use_cache=True)
        found = composed.model(LONG[:, 20:], cache=cache, use_cache=True).logits
    close(found, logits_of(composed.model, LONG)[:, 20:])


def test_threads_do_not_share_evidence(composed):
    """Two threads that run one model get what each gets alone."""
    texts = [LONG, LONG.flip(1)]
    expected = [logits_of(composed.model, text) for text in texts]
    found: dict[int, torch.Tensor] = {}

    def run(number: int) -> None:
        for _ in range(5):
            found[number] = logits_of(composed.model, texts[number])

    threads = [threading.Thread(target=run, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in (0, 1):
        close(found[number], expected[number])


def test_a_pass_keeps_the_plan_with_which_it_began(composed):
    """A change in the middle of a pass acts from the next one on, for every router."""
    before = logits_of(composed.model)
    changed = []

    def change(*_) -> None:
        if not changed:
            changed.append(True)
            composed.change(router=Fixed("ada"))

    handle = composed.model.model.layers[0].mlp.register_forward_hook(change)
    assert torch.equal(logits_of(composed.model), before)
    handle.remove()
    assert not torch.equal(logits_of(composed.model), before)


def test_after_a_change_evidence_begins_anew(composed):
    """A cache from before the change is read on; its evidence is of the old shelf and is left."""
    cache = DynamicCache(config=composed.model.config)
    with torch.no_grad():
        composed.model(LONG[:, :20], cache=cache, use_cache=True)
    shelf = composed.plan.shelf.minus("cyd")
    with composed.resting():
        router = ready(composed.model, shelf, ROUTER)
    composed.change(shelf=shelf, router=router)
    with torch.no_grad():
        found = composed.model(LONG[:, 20:], cache=cache, use_cache=True).logits
    assert torch.isfinite(found).all()


def test_a_failed_pass_leaves_nothing(composed):
    """After an error in the middle the next pass starts clean."""
    before = logits_of(composed.model)

    def fail(*_) -> None:
        raise KeyboardInterrupt

    for error in (fail, lambda *_: 1 / 0):
        handle = composed.model.model.layers[1].mlp.register_forward_pre_hook(error)
        with pytest.raises((KeyboardInterrupt, ZeroDivisionError)):
            composed.model(IDS)
        handle.remove()
        assert torch.equal(logits_of(composed.model), before)


def test_an_inner_model_may_be_called(composed):
    """`model.model` is a pass, too."""
    with torch.no_grad():
        inner = composed.model.model(IDS).last_hidden_state
        outer = composed.model(IDS, output_hidden_states=True).hidden_states[-1]
    close(inner, outer)


def test_evidence_from_some_modules_only(library: Path):
    """All sites decide; a prefill and decoding agree."""
    model, shelf = tiny_llama(), Shelf.open(library)
    router = ready(model, shelf, Pooled(evidence="*.up_proj", top_k=2))
    with Composed(model, shelf, router) as composed:
        cache = DynamicCache(config=model.config)
        close(step_by_step(model, IDS, cache), logits_of(model))
        with record(composed) as trace:
            model(IDS)
        assert len(trace.sites) == 14


def test_gradients_flow_and_checkpointing_is_refused(composed):
    """Backward works; recomputed modules have no memory, and say so."""
    embeds = composed.model.get_input_embeddings()(IDS).detach().requires_grad_()
    composed.model(inputs_embeds=embeds).logits.sum().backward()
    assert embeds.grad.abs().sum() > 0
    composed.model.activation_checkpointing_enable()
    composed.model.train()
    with pytest.raises(UnsupportedRuntimeError, match="checkpointing"):
        composed.model(inputs_embeds=embeds, use_cache=False).logits.sum().backward()


def test_a_cache_from_a_file_is_refused(composed):
    """It can be pickled; that its evidence is nobody's any more is told, not passed over."""
    cache = DynamicCache(config=composed.model.config)
    with torch.no_grad():
        composed.model(LONG[:, :20], cache=cache, use_cache=True)
        again = pickle.loads(pickle.dumps(cache))
        with pytest.raises(UnsupportedRuntimeError, match="pickled"):
            composed.model(LONG[:, 20:], cache=again, use_cache=True)
        with composed.resting():
            composed.model(LONG[:, 20:], cache=pickle.loads(pickle.dumps(cache)), use_cache=True)
