"""Laws of measured updates, on real tiny chains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from expertmix.errors import NoSitesError, UnsupportedModelError
from expertmix.experts.chain import Chain
from expertmix.experts.chain_updates import chains_in, update_norms
from expertmix.models.coe import CoeConfig, CoeForCausalLM


def tiny(**settings: Any) -> CoeForCausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 50, "hidden_size": 16, "moe_intermediate_size": 8, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "num_iterations": 3,
        "initializer_range": 0.3,
    }  # fmt: skip
    return CoeForCausalLM(CoeConfig(**(sizes | settings))).eval()


def texts(rows: int = 8, columns: int = 7) -> torch.Tensor:
    return torch.randint(1, 50, (rows, columns), generator=torch.Generator().manual_seed(1))


def measured(model: nn.Module, run: Callable[[], Any]) -> list[list[float]]:
    with torch.no_grad(), update_norms(model) as meter:
        run()
    return [[one.value for one in (*layer.size, *layer.cosine)] for layer in meter.layers]


def by_hand(chain: Chain, x_TH: torch.Tensor) -> list[float]:
    """What a loop over the iterations of an inner residual gives."""
    sizes, cosines, before = [], [], None
    for number in range(chain.depth):
        update, _ = chain.iteration(number)(x_TH, number, chain, None, None)
        sizes.append(float((update.norm(dim=-1) / x_TH.norm(dim=-1)).mean()))
        if before is not None:
            cosines.append(float(torch.cosine_similarity(before, update, dim=-1).mean()))
        before, x_TH = update, x_TH + update
    return sizes + cosines


def test_a_loop_says_the_same() -> None:
    """Sizes and cosines are those of a loop by hand over what enters each layer."""
    model, entered = tiny(), {}
    for name, chain in chains_in(model).items():
        chain.register_forward_pre_hook(
            lambda module, args, name=name: entered.__setitem__(name, args[0].flatten(0, 1))
        )
    found = measured(model, lambda: model(texts()))
    for values, (name, chain) in zip(found, chains_in(model).items(), strict=True):
        with torch.no_grad():
            assert values == pytest.approx(by_hand(chain, entered[name]), rel=1e-5)


@pytest.mark.parametrize("left", [True, False])
def test_padding_does_not_count(left: bool) -> None:
    """A padded batch measures what its rows measure alone."""
    model, rows = tiny(), [texts(1, size) for size in (3, 6, 5)]
    blank = [torch.zeros(1, 6 - row.shape[1], dtype=torch.int64) for row in rows]
    ends = [(pad, row) if left else (row, pad) for pad, row in zip(blank, rows, strict=True)]
    ids = torch.cat([torch.cat(pair, 1) for pair in ends])
    real = (ids > 0).long()

    def alone() -> None:
        for row in rows:
            model(row)

    places = (real.cumsum(1) - 1).clamp(min=0)
    padded = measured(model, lambda: model(input_ids=ids, attention_mask=real, position_ids=places))
    for values, expected in zip(padded, measured(model, alone), strict=True):
        assert values == pytest.approx(expected, rel=1e-4)


def test_decoding_is_the_full_pass() -> None:
    """Token by token with a cache, the same is measured as in one pass."""
    model, ids = tiny(), texts()

    def decode() -> None:
        cache = model(ids[:, :4], use_cache=True).cache
        for place in range(4, ids.shape[1]):
            cache = model(ids[:, place : place + 1], cache=cache, use_cache=True).cache

    full = measured(model, lambda: model(ids))
    for values, expected in zip(measured(model, decode), full, strict=True):
        assert values == pytest.approx(expected, rel=1e-4)


def test_nothing_is_changed_and_nothing_stays() -> None:
    """The output is bit for bit the same, and no hook is left, also after an error."""
    model, ids = tiny(), texts()
    plain = model(ids).logits

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    before = hooks()
    with update_norms(model):
        assert torch.equal(model(ids).logits, plain)
        assert hooks() > before
    with pytest.raises(ZeroDivisionError), update_norms(model):
        raise ZeroDivisionError
    assert hooks() == before


def test_a_zero_scale_does_nothing() -> None:
    """An iteration with scale zero measures zero, and has no cosine."""
    model = tiny(iteration_scale=True, num_iterations=2)
    with torch.no_grad():
        for chain in chains_in(model).values():
            chain.iteration(1).scale.zero_()  # type: ignore[union-attr]
    for first, second, cosine in measured(model, lambda: model(texts())):
        assert first > 0
        assert second == 0
        assert cosine != cosine


def test_recomputation_counts_once() -> None:
    """With gradient checkpointing, the backward pass measures nothing more."""
    model, ids = tiny(checkpoint_iterations=True).train(), texts()
    with update_norms(model) as meter:
        loss = model(ids, labels=ids).loss
        before = [float(mean._count.sum()) for mean in meter._sums.values()]
        loss.backward()
        assert [float(mean._count.sum()) for mean in meter._sums.values()] == before
    assert before == [ids.numel()] * len(before)


def test_halted_tokens_do_not_count() -> None:
    """A token that has halted gets no update, and is left out of the mean."""
    model = tiny(halting_threshold=1e9)
    found = measured(model, lambda: model(texts()))
    assert [len(values) for values in found] == [1, 1]


def test_intervals_need_texts() -> None:
    """Eight texts give an interval around the mean, two give none."""
    model = tiny()
    with torch.no_grad(), update_norms(model) as meter:
        model(texts(8))
    size = meter.layers[0].size[0]
    assert size.low < size.value < size.high
    with torch.no_grad(), update_norms(model) as meter:
        model(texts(2))
    assert meter.layers[0].size[0].low != meter.layers[0].size[0].low


def test_other_models_are_refused() -> None:
    """A model without chains, and a chain without a model, are named."""
    with pytest.raises(NoSitesError, match="no chain"), update_norms(nn.Linear(2, 2)):
        pass
    bare = chains_in(tiny())["model.layers.0.mlp"]
    with pytest.raises(UnsupportedModelError, match="no full model"), update_norms(bare):
        pass
