"""A model with many adapters: less is multiplied, and everything stays what it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from expertmix.core.record import record
from expertmix.core.removal import Ablate, Mask
from expertmix.core.replay import Replay
from expertmix.core.reweight import Reweight
from expertmix.core.trace import Trace
from expertmix.errors import ConfigError
from expertmix.experts.composed import Composed
from expertmix.experts.fused import Combination
from expertmix.experts.shelf import Shelf
from expertmix.routers.arrow import Arrow
from expertmix.routers.directions import Directions
from expertmix.routers.fixed import Fixed
from expertmix.routers.lag import Lag
from expertmix.routers.router import Router
from expertmix.routers.spectr import SpectR

from .world import (
    IDS,
    arrow_score,
    close,
    deltas,
    double,
    logits_of,
    naive,
    projection_score,
    random_adapter,
    tiny_llama,
    top_weights,
)

COUNT, WIDE = 120, (16, 9)
SITE = "model.layers.1.mlp.up_proj"
MODULES = tuple(f"model.layers.{layer}.mlp.{name}" for layer in (0, 1)
                for name in ("gate_proj", "up_proj"))  # fmt: skip
LONG = torch.randint(3, 32, WIDE, generator=torch.Generator().manual_seed(5))
SOFT = SpectR(top_k=2, weights="softmax", temperature=4.0)


def some() -> list:
    """Of three ranks; every fifth adapts one module of a pair only."""
    return [
        random_adapter(
            f"a{i}", i, MODULES[:: 2 if i % 5 == 0 else 1], rank=2 + i % 3, dtype=torch.float32
        )
        for i in range(COUNT)
    ]


@pytest.fixture(scope="module")
def shelf() -> Shelf:
    return Shelf.of(some())


def composed(
    shelf: Shelf, router: Router, how: Combination = "outputs", projections: Any = "sieved"
) -> Composed:
    return Composed(tiny_llama(), shelf, router, combination=how, projections=projections)


@torch.no_grad()
def traced(made: Composed, *edits: Any, ids=LONG, **options: Any) -> tuple[Trace, torch.Tensor]:
    with record(made, *edits, **options) as trace:
        logits = made.model(ids).logits
    return trace, logits


class Sizes(TorchDispatchMode):
    """The shapes of everything that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.shapes += [tuple(x.shape) for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        return out


def lag_score(x: torch.Tensor, updates: list[torch.Tensor], m: int) -> list[float]:
    first = [arrow_score(x, update) for update in updates]
    kept = sorted(range(len(first)), key=lambda expert: -first[expert])[:m]
    return [
        projection_score(x, update) if expert in kept else float("-inf")
        for expert, update in enumerate(updates)
    ]


@pytest.mark.parametrize("kind", ["spectr", "lag"])
def test_a_large_shelf_is_the_naive_loop(shelf, kind, monkeypatch):
    """Logits equal a float64 loop over tokens and adapters, sieved and filtered."""
    monkeypatch.setattr(Directions, "apart", lambda *_: True)
    router = SpectR(top_k=2) if kind == "spectr" else Lag(m=5, top_k=2)
    adapters, model = double(some()), tiny_llama(dtype=torch.float64)

    def weigh(module, flat):
        updates = deltas(adapters, module)
        return torch.stack([
            top_weights(
                [projection_score(x, update) for update in updates]
                if kind == "spectr" else lag_score(x, updates, 5), 2, "uniform",
            )
            for x in flat
        ])  # fmt: skip

    with naive(model, adapters, weigh), torch.no_grad():
        expected = model(IDS).logits
    with composed(shelf, router) as made:
        found = logits_of(made.model)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("how", ["outputs", "aligned"])
@pytest.mark.parametrize("ids", [IDS[:1, :1], LONG], ids=["one", "many"])
def test_a_sieved_model_is_the_exact_one(shelf, how, ids):
    """Logits with a sieve are those without, whether it was used for one token or for many."""
    found = []
    for projections in ("sieved", "exact"):
        with composed(shelf, SOFT, how, projections) as made:
            found.append(logits_of(made.model, ids))
    close(*found)


@pytest.mark.parametrize("router", [SOFT, Lag(m=5, top_k=2), Arrow(), Fixed("a7")])
def test_recording_changes_no_bit_and_shows_what_decides(shelf, router):
    """The same logits with a trace, with its scores, and replayed."""
    with composed(shelf, router) as made:
        plain = logits_of(made.model, LONG)
        trace, logits = traced(made)
        assert torch.equal(logits, plain)
        shown, logits = traced(made, logits=True)
        assert torch.equal(logits, plain)
        close(traced(made, Replay(trace))[1], plain)
    for site in trace.sites:
        assert torch.equal(shown[site].indices, trace[site].indices)
        best = shown[site].logits.topk(trace[site].indices.shape[1]).indices
        assert torch.equal(best.sort(1).values, trace[site].indices.sort(1).values)


@pytest.mark.parametrize(
    "edit",
    [
        Ablate("*", experts=range(0, COUNT, 2)),
        Mask("*", experts=range(0, COUNT, 2)),
        Reweight("*", torch.full((60,), 9.0), stage="logits", mode="add",
                 experts=tuple(range(60))),
        Reweight("*", torch.linspace(0, 1, COUNT), stage="weights"),
    ],
    ids=["ablate", "mask", "logits", "weights"],
)  # fmt: skip
def test_edits_do_the_same_with_a_sieve(shelf, edit):
    """Also edits that promote adapters which no rough score would have named."""
    found = []
    for projections in ("sieved", "exact"):
        with composed(shelf, SOFT, projections=projections) as made:
            found.append(traced(made, edit))
    (sieved, sieved_logits), (exact, exact_logits) = found
    close(sieved_logits, exact_logits)
    for site in sieved.sites:
        assert torch.equal(sieved[site].indices, exact[site].indices)


@pytest.mark.parametrize("router", [SOFT, Lag(m=5, top_k=2)])
def test_prefill_and_cached_decoding_route_alike(shelf, router):
    """Many tokens at once and one after the other are decided alike, though computed otherwise."""
    with composed(shelf, router) as made:
        with record(made) as stepped:
            out = made.model.generate(
                LONG, max_new_tokens=3, min_new_tokens=3, do_sample=False,
                attention_mask=torch.ones_like(LONG),
            )  # fmt: skip
        whole, _ = traced(made, ids=out[:, :-1])
    for site in whole.sites:
        for row in range(len(LONG)):
            one = stepped[site].rows(stepped.tokens.sample == row)
            two = whole[site].rows(whole.tokens.sample == row)
            assert torch.equal(one.indices, two.indices)
            close(one.weights, two.weights)


def test_padding_changes_nothing(shelf):
    """A padded row among many gets the logits it gets alone."""
    ids = torch.cat([torch.zeros(16, 3, dtype=torch.int64), LONG[:, :6]], 1)
    mask = (ids != 0).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with composed(shelf, SOFT) as made:
        batch = logits_of(made.model, ids, attention_mask=mask, position_ids=positions)
        close(batch[:1, 3:], logits_of(made.model, LONG[:1, :6]))


@pytest.mark.parametrize("router", [SOFT, Lag(m=5, top_k=2, weights="softmax")])
def test_gradients_arrive_exactly(shelf, router):
    """Gradients of the embeddings are those without sieve or filter of rough scores."""
    grads = []
    for projections in ("sieved", "exact"):
        with composed(shelf, router, projections=projections) as made:
            embeds = made.model.get_input_embeddings()(LONG).detach().requires_grad_()
            made.model(inputs_embeds=embeds).logits.square().mean().backward()
            grads.append(embeds.grad)
    close(*grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_go_on(shelf, dtype):
    """A model in half precision needs no sieve; one in float64 has one."""
    with composed(shelf, SOFT) as made:
        made.model.to(dtype)
        assert logits_of(made.model, LONG).isfinite().all()
        seen = made.plan.seen(SITE, torch.zeros(144, 32, dtype=dtype), exact=False)
        assert (seen.rough is None) == (dtype == torch.bfloat16)


@pytest.mark.parametrize("router", [Lag(m=5, top_k=2), Arrow(), Fixed("a7"), SOFT])
def test_nothing_large_is_made_that_was_not_asked_for(shelf, router):
    """Nothing of tokens × adapters × output; tokens × directions only where all are scored."""
    tokens = LONG.numel()
    with composed(shelf, router, projections="exact") as made:
        logits_of(made.model, LONG)  # stacks are built on first use
        with Sizes() as sizes:
            logits_of(made.model, LONG)
    ranks = sum(2 + i % 3 for i in range(COUNT))
    largest = max(torch.Size(shape).numel() for shape in sizes.shapes)
    assert largest < tokens * COUNT * 48 / 2
    wide = [shape for shape in sizes.shapes if tokens in shape and max(shape) > ranks / 2]
    assert bool(wide) == router.whole


def test_unknown_projections_are_refused(shelf):
    """What cannot be is refused before anything is hooked."""
    for wrong in ("rough", torch.int8, torch.float8_e4m3fn):
        with pytest.raises(ConfigError, match="projections must be exact, sieved"):
            composed(shelf, SOFT, projections=wrong)
