from __future__ import annotations

import math

import pytest
import torch

from expertmix.bindings.record import record
from expertmix.experts.chain import Chain
from expertmix.models.coe import CoeConfig, CoeForCausalLM
from expertmix.study.train_balance import BiasBalance
from expertmix.study.train_routing import RoutingWatch, scalars
from expertmix.testing import tiny_lm, tiny_moe

SIZES = {
    "vocab_size": 32, "hidden_size": 16, "moe_intermediate_size": 8, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_experts": 6, "num_experts_per_tok": 2, "initializer_range": 0.3,
}  # fmt: skip


def coe(**changes) -> CoeForCausalLM:
    torch.manual_seed(0)
    return CoeForCausalLM(CoeConfig(**SIZES, **changes))


def watched(model, ids, passes: int = 1):
    watch = RoutingWatch(model)
    with watch.attached(), watch.looking(True):
        for _ in range(passes):
            model(input_ids=ids)
    return watch.take()


IDS = torch.arange(24).view(2, 12)


@torch.no_grad()
def test_what_is_seen_of_a_chain_is_what_it_did() -> None:
    """Load, retention, entropy and size of updates, against the layer's own calls."""
    model = coe()
    calls: dict[tuple[int, int], tuple] = {}
    chains = [one for one in model.modules() if isinstance(one, Chain)]
    for layer, chain in enumerate(chains):
        for iteration in chain.iterations:
            iteration.register_forward_hook(
                lambda module, args, out, layer=layer: calls.update({(layer, args[1]): (args, out)})
            )
    sites = {one.site: one for one in watched(model, IDS)}
    assert len(sites) == 4
    for (layer, number), (args, (update_TH, routed)) in calls.items():
        one = sites[f"model.layers.{layer}.mlp#{number}"]
        counts_E = torch.bincount(routed.experts.flatten(), minlength=6)
        assert one.load == pytest.approx((counts_E / counts_E.sum()).tolist())
        assert one.dead == tuple((counts_E == 0).nonzero().flatten().tolist())
        assert one.load_max_over_mean == pytest.approx(
            float(counts_E.max() / counts_E.float().mean())
        )
        ratio = float((update_TH.norm(dim=-1) / args[0].norm(dim=-1)).mean())
        assert one.update_norm == pytest.approx(ratio, rel=1e-4)
        logits_TE = chains[layer].gate_of(number)(chains[layer].iteration(number).norm(args[0]))[0]
        p_TE = logits_TE.softmax(-1)
        entropy = float(-(p_TE * p_TE.log()).sum(-1).mean()) / math.log(6)
        assert one.entropy == pytest.approx(entropy, rel=1e-4)
        if not number:
            assert one.retention is None
            continue
        pairs = zip(calls[layer, 0][1][1].experts.tolist(), routed.experts.tolist(), strict=True)
        kept = [len(set(a) & set(b)) / 2 for a, b in pairs]
        assert one.retention == pytest.approx(sum(kept) / len(kept))


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen2_moe", "deepseek_v3"])
def test_plain_mixtures_are_seen_too(family: str) -> None:
    """The load is what recording says; there is no iteration to keep a route from."""
    model = tiny_moe(family)
    with record(model) as trace:
        model(input_ids=IDS)
    for one in watched(model, IDS):
        indices = trace[one.site].indices
        counts_E = torch.bincount(indices.flatten(), minlength=len(one.load))
        assert one.load == pytest.approx((counts_E / counts_E.sum()).tolist())
        assert (one.retention, one.update_norm) == (None, None)
        assert 0 < one.entropy <= 1


def test_watching_changes_nothing_and_ends() -> None:
    """Outputs are the same bit for bit; no hook is left; not looking, nothing is counted."""
    model = coe()
    before = model(input_ids=IDS).logits
    watch = RoutingWatch(model)
    with watch.attached(), watch.looking(True):
        assert torch.equal(model(input_ids=IDS).logits, before)
    assert watch.take()
    with watch.attached():
        model(input_ids=IDS)
    assert watch.take() == []
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in model.modules())


def test_a_recomputation_is_not_counted_twice() -> None:
    """Under activation checkpointing a backward pass runs the layer again."""
    model = coe(checkpoint_iterations=True).train()
    plain = coe().train()
    watch = RoutingWatch(model)
    with watch.attached():
        with watch.looking(True):
            loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
    assert watch.take() == watched(plain, IDS)


def test_passes_add_up() -> None:
    """Two equal passes have the shares of one."""
    assert watched(coe(), IDS, passes=2) == watched(coe(), IDS)


def test_trackers_get_numbers_by_name() -> None:
    """One per figure and site; what is unknown is left out."""
    found = scalars(watched(coe(), IDS))
    assert found["load_max_over_mean/model.layers.0.mlp#0"] >= 1
    assert "retention/model.layers.0.mlp#0" not in found
    assert all(isinstance(value, float) for value in found.values())


def test_a_dense_model_has_nothing_to_see() -> None:
    """And is no error."""
    assert not RoutingWatch(tiny_lm()).routed


def test_biases_move_against_the_load() -> None:
    """b += rate · sign(mean load - load), for each iteration's router by its own load."""
    model = coe(router_bias=True)
    balance = BiasBalance(model, 0.01)
    sites = {one.site: one for one in watched(model, IDS)}
    with balance.attached(), balance.counting():
        model(input_ids=IDS)
    balance.update()
    for layer, chain in enumerate(one for one in model.modules() if isinstance(one, Chain)):
        for number in range(2):
            load_E = torch.tensor(sites[f"model.layers.{layer}.mlp#{number}"].load)
            moved_E = 0.01 * (1 / 6 - load_E).sign()
            assert torch.allclose(chain.gate_of(number).e_score_correction_bias, moved_E)
    assert not BiasBalance(coe(), 0.01).needed


def test_the_bias_evens_the_load() -> None:
    """After many moves the busiest expert is less busy."""
    model = coe(router_bias=True)
    before = max(one.load_max_over_mean for one in watched(model, IDS))
    balance = BiasBalance(model, 0.01)
    with balance.attached():
        for _ in range(60):
            with balance.counting():
                model(input_ids=IDS)
            balance.update()
    assert max(one.load_max_over_mean for one in watched(model, IDS)) < before
