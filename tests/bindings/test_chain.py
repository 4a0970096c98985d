"""Every iteration of a chain of experts is a site of its own, and obeys the laws of sites."""

from __future__ import annotations

import copy

import pytest
import torch
from chain_cases import (
    ALL,
    CASES,
    IDS,
    depth,
    factors,
    logits_of,
    made,
    ran,
    sites_of,
    spied,
    traced,
)
from pathway_cases import hooks
from peft import LoraConfig, get_peft_model
from surgery import remove
from transformers import MixtralConfig, MixtralForCausalLM

import expertmix as em
from expertmix.bindings.discovery import find_blocks, find_layers
from expertmix.bindings.transformers import TransformersMoE
from expertmix.errors import InterventionError, UnsupportedRuntimeError
from expertmix.experts.chain_settings import NORMS, RESIDUALS
from expertmix.testing import tiny_adapters

PLACE = "model.layers.1.mlp"
LATER = f"{PLACE}#1"


@pytest.fixture(params=CASES, ids=str)
def model(request):
    return made(**request.param)


# --- sites --------------------------------------------------------------------------------------


def test_sites_are_layer_by_layer_and_iteration_by_iteration():
    """A chain has a site per iteration; a dense layer has none; the chain itself is one layer."""
    model = made(num_hidden_layers=3, dense_layers=[1])
    assert sites_of(model) == [f"model.layers.{n}.mlp#{t}" for n in (0, 2) for t in (0, 1)]
    assert [block.info.site.step for block in find_layers(model)] == [0, 0]


@pytest.mark.parametrize("gating", ["independent", "shared", "fixed"])
@pytest.mark.parametrize("active", [1, 3])
def test_active_iterations_are_the_sites(gating, active):
    """With C = 2, `active_iterations` 1 and 3 give so many sites, each with what its run got."""
    model = made(gating=gating, active_iterations=active)
    assert sites_of(model) == [f"model.layers.{n}.mlp#{t}" for n in (0, 1) for t in range(active)]
    before = logits_of(model)
    with spied(model) as got, em.record(model, logits=True) as trace:
        assert torch.equal(logits_of(model), before)
    for site, (indices, weights) in got.items():
        assert torch.equal(trace[site].indices, indices)
        assert torch.equal(trace[site].weights, weights)
    assert torch.equal(logits_of(model, em.Replay(trace)), before)


def test_more_iterations_than_sites_are_refused():
    """Running more of them inside a block is an error: their decisions would have no name."""
    model = made()
    with em.record(model):
        model.config.active_iterations = 3
        with pytest.raises(UnsupportedRuntimeError, match="active_iterations"):
            model(IDS)
    assert hooks(model) == 0


# --- recording ----------------------------------------------------------------------------------


def test_recorded_is_what_the_experts_got(model):
    """Indices and weights of every site are the arguments of that call, and no bit changes."""
    before = logits_of(model)
    with spied(model) as got, em.record(model, logits=True) as trace:
        assert torch.equal(logits_of(model), before)
    assert [str(site) for site in trace.sites] == list(got)
    for site, (indices, weights) in got.items():
        assert torch.equal(trace[site].indices, indices)
        assert torch.equal(trace[site].weights, weights)
    assert torch.equal(logits_of(model), before)
    assert hooks(model) == 0


def test_recorded_is_what_the_router_gives_by_hand(model):
    """Weights, indices and logits of each iteration are its router's, asked by hand on its input.

    A decision that is kept is the one of the first iteration.
    """
    trace = traced(model, options={"logits": True})
    for block, hidden, halted in ran(model):
        logits, weights, indices = block.router(hidden)
        decision = trace[block.info.site]
        if halted is not None:
            weights = weights.masked_fill(halted[:, None], 0.0)
        assert torch.equal(decision.indices, indices)
        assert torch.equal(decision.weights, weights)
        assert torch.equal(decision.logits, logits)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("residual", RESIDUALS)
def test_residuals_and_norms_are_recorded_and_replayed(residual, norm):
    """For all five residuals and both norms: no bit changes, and a trace replays bit for bit."""
    model = made(residual=residual, norm=norm)
    before = logits_of(model)
    with em.record(model) as trace:
        assert torch.equal(logits_of(model), before)
    with em.record(model, em.Replay(trace)):
        assert torch.equal(logits_of(model), before)


def test_decisions_are_those_of_the_family_that_it_is():
    """With C = 1, a Mixtral of the same weights decides the same at every layer."""
    model = made(num_iterations=1, norm_topk_prob=True, rms_norm_eps=1e-5)
    config = model.config
    plain = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=config.vocab_size, hidden_size=config.hidden_size,
            intermediate_size=config.moe_intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            num_local_experts=config.num_experts, num_experts_per_tok=config.num_experts_per_tok,
            rms_norm_eps=config.rms_norm_eps, rope_parameters=config.rope_parameters,
        )
    ).eval()  # fmt: skip
    own = {
        name.replace("mlp.iterations.0.norm", "post_attention_layernorm").replace(
            "mlp.iterations.0.gate", "mlp.gate"
        ): tensor
        for name, tensor in model.state_dict().items()
    }
    plain.load_state_dict(own)
    mine, theirs = traced(model), traced(plain)
    assert mine.sites == theirs.sites
    for site in mine.sites:
        assert torch.equal(mine[site].indices, theirs[site].indices)
        torch.testing.assert_close(mine[site].weights, theirs[site].weights)


def test_generating_decides_as_one_full_pass(model):
    """Prefill and cached decoding decide, in every iteration, as a pass over the finished text."""
    with em.record(model) as stepped:
        out = model.generate(IDS[:1], max_new_tokens=5, min_new_tokens=5, do_sample=False)
    whole = traced(model, ids=out[:, :-1])
    assert torch.equal(stepped.tokens.token_id, whole.tokens.token_id)
    for site in whole.sites:
        assert torch.equal(stepped[site].indices, whole[site].indices)
        torch.testing.assert_close(stepped[site].weights, whole[site].weights)


def test_halted_tokens_have_no_weight():
    """Where a token has halted its weights are 0; where all have, the site has no decision."""
    model = made(halting_threshold=0.35, num_iterations=3)
    trace = traced(model)
    halted = {str(block.info.site): halted for block, _, halted in ran(model)}
    mixed = [one for one in halted.values() if one is not None and one.any() and not one.all()]
    assert mixed
    for site, gone in halted.items():
        dead = (trace[site].weights == 0).all(1)
        assert torch.equal(dead, torch.zeros_like(dead) if gone is None else gone)
    model.config.halting_threshold = 1e9
    trace = traced(model)
    assert (trace[f"{PLACE}#1"].indices == -1).all()


def test_a_trace_file_keeps_iterations(tmp_path):
    """Streamed to a file, every iteration comes back; a file replays bit for bit."""
    model = made()
    with em.record(model, logits=True, to=tmp_path / "trace.parquet"):
        before = logits_of(model)
        logits_of(model, ids=IDS[:1])
    loaded, held = em.Trace.load(tmp_path / "trace.parquet"), traced(model, options=ALL)
    assert [str(site) for site in loaded.sites] == sites_of(model)
    for site in loaded.sites:
        rows = IDS.numel()
        assert torch.equal(loaded[site].indices[:rows], held[site].indices)
        assert torch.equal(loaded[site].logits[:rows], held[site].logits)
    with em.record(model, em.Replay(loaded)):
        assert torch.equal(logits_of(model), before)


def test_one_block_inside_another(model):
    """An inner block sees what an outer one edits, in its iteration only."""
    site = f"{PLACE}#{depth(model) - 1}"
    with em.record(model, em.Ablate(site, [0, 1])) as outer, em.record(model) as inner:
        logits_of(model)
    for name in outer.sites:
        assert torch.equal(outer[name].weights, inner[name].weights)
    assert hooks(model) == 0


# --- editing ------------------------------------------------------------------------------------


def test_ablating_an_iteration_leaves_the_others(model):
    """`Ablate` at `#1` takes the expert out of iteration 1; what ran before it is bit for bit."""
    plain = traced(model)
    expert = int(plain[LATER].indices[0, 0])
    edited = traced(model, em.Ablate(LATER, [expert]))
    before = [site for site in plain.sites if str(site) < LATER]
    assert all(plain[site].equal(edited[site]) for site in before)
    assert not edited[LATER].chosen()[:, expert].any()
    kept = plain[LATER].indices != expert
    assert torch.equal(edited[LATER].weights[kept], plain[LATER].weights[kept])


def test_ablating_by_name_is_every_iteration():
    """A pattern without `#` names every iteration: as if the expert gave zero there."""
    model = made()
    edited = logits_of(model, em.Ablate(PLACE, [3]))
    brute = copy.deepcopy(model)
    experts = brute.get_submodule(f"{PLACE}.experts")
    experts.down_proj.data[3] = 0
    torch.testing.assert_close(edited, logits_of(brute), rtol=1e-5, atol=1e-6)
    both = logits_of(model, em.Ablate(f"{PLACE}#0", [3]), em.Ablate(f"{PLACE}#1", [3]))
    assert torch.equal(edited, both)


@pytest.mark.parametrize("gating", ["independent", "shared"])
@pytest.mark.parametrize(
    "rule",
    [{}, {"scores": "sigmoid", "router_bias": True}, {"n_group": 2, "topk_group": 1}],
    ids=["softmax", "bias", "groups"],
)
def test_masking_an_iteration_selects_again(gating, rule, monkeypatch):
    """`Mask` at `#1`: that iteration's router chooses again, by its own rule."""
    model = made(gating=gating, **rule)
    plain = traced(model)
    expert = int(plain[LATER].indices[0, 0])
    edited = traced(model, em.Mask(LATER, [expert]), options={"logits": True})
    assert all(plain[site].equal(edited[site]) for site in plain.sites if str(site) < LATER)
    block, hidden, _ = next(one for one in ran(model) if str(one[0].info.site) == LATER)
    by_hand = copy.deepcopy(block.router)
    by_hand._eligible = forbidding(by_hand, expert)
    monkeypatch.setattr(torch.nn.functional, "linear", without(expert))
    _, weights, indices = by_hand(hidden)
    assert torch.equal(edited[LATER].indices, indices)
    assert torch.equal(edited[LATER].weights, weights)
    assert not (indices == expert).any()


def without(expert):
    """A gate that gives minus infinity for an expert."""
    own = torch.nn.functional.linear

    def linear(hidden, weight):
        return own(hidden, weight).index_fill(1, torch.tensor([expert]), float("-inf"))

    return linear


def forbidding(router, expert):
    """What top-k reads, minus infinity for an expert."""
    own = type(router)._eligible
    place = torch.tensor([expert])
    return lambda scores: own(router, scores).index_fill(1, place, float("-inf"))


def test_masking_by_name_is_a_chain_without_the_expert():
    """A pattern without `#`: as a model from which expert and gate rows were cut, everywhere."""
    model = made()
    edited = logits_of(model, em.Mask(PLACE, [3]))
    brute = copy.deepcopy(model)
    blocks = [block for block in find_blocks(brute) if block.info.site.name == PLACE]
    remove(blocks[0], 3)
    gate = blocks[1].router
    keep = [e for e in range(len(gate.weight)) if e != 3]
    gate.weight = torch.nn.Parameter(gate.weight.data[keep])
    torch.testing.assert_close(edited, logits_of(brute), rtol=1e-5, atol=1e-6)


def test_masking_a_kept_decision():
    """With fixed gating, edits by name hold in all iterations; of a later one alone, none do."""
    model = made(gating="fixed")
    values = torch.linspace(-1, 1, 8)
    for edit in (
        (em.Mask, [3]),
        (em.Reweight, values, "logits"),
        (em.Reweight, values.exp(), "probabilities"),
    ):
        both, alone = (traced(model, edit[0](name, *edit[1:])) for name in (PLACE, f"{PLACE}#0"))
        assert torch.equal(both[LATER].indices, both[f"{PLACE}#0"].indices)
        assert torch.equal(both[LATER].indices, alone[LATER].indices)
    for wrong in (
        [em.Mask(LATER, [3])],
        [em.Reweight(LATER, values, "logits")],
        [em.Mask(PLACE, [3]), em.Reweight(LATER, values, "logits")],
        [em.Mask(f"{PLACE}#0", [3]), em.Mask(LATER, [4])],
    ):
        with pytest.raises(InterventionError, match="keeps the decision of"):
            traced(model, *wrong)
    assert hooks(model) == 0


@pytest.mark.parametrize("stage", ["logits", "probabilities", "weights"])
@pytest.mark.parametrize("gating", ["independent", "shared"])
def test_reweighting_an_iteration_leaves_the_others(stage, gating):
    """`Reweight` at `#1`, at every stage, moves that iteration and nothing before it."""
    model = made(gating=gating)
    plain = traced(model)
    factors = torch.linspace(0.5, 1.5, 8)
    edited = traced(model, em.Reweight(LATER, factors, stage=stage))
    assert all(plain[site].equal(edited[site]) for site in plain.sites if str(site) < LATER)
    assert not plain[LATER].equal(edited[LATER])


def test_a_trace_replays_bit_for_bit(model):
    """Replaying gives the same logits, also with scrambled routers."""
    before = logits_of(model)
    trace = traced(model)
    assert torch.equal(logits_of(model, em.Replay(trace)), before)
    scrambled = copy.deepcopy(model)
    for block in find_blocks(scrambled):
        block.router.weight.data.normal_(generator=torch.Generator().manual_seed(9))
    assert not torch.equal(logits_of(scrambled), before)
    assert torch.equal(logits_of(scrambled, em.Replay(trace, any_model=True)), before)


# --- gradients ----------------------------------------------------------------------------------


def test_gradients_reach_the_weights_of_each_iteration(model):
    """`grad=True`: each site's gradient is that of factors on the weights of that call alone."""
    with em.record(model, grad=True) as trace:
        model(IDS).logits.square().mean().backward()
    with factors(model) as used:
        wanted = torch.autograd.grad(model(IDS).logits.square().mean(), list(used.values()))
    assert sites_of(model) == list(used)
    for site, slope in zip(used, wanted, strict=True):
        weights = trace[site].weights
        torch.testing.assert_close(weights.grad * weights, slope)
        assert slope.abs().max() > 0


@pytest.mark.parametrize("how", ["iterations", "layers", "both"])
def test_checkpointing_changes_no_trace(model, how):
    """Computing iterations or layers again: the same trace, edits and gradients of parameters."""
    edit = em.Ablate(LATER, [0, 1, 2])
    found = []
    for on in (False, True):
        model.config.checkpoint_iterations = on and how != "layers"
        if on and how != "iterations":
            model.activation_checkpointing_enable()
        model.train()
        model.zero_grad()
        hooked = hooks(model)
        with em.record(model, edit, grad=True) as trace:
            model(IDS).logits.square().mean().backward()
        assert hooks(model) == hooked
        found.append((trace, [one.grad.clone() for one in model.parameters()]))
    (plain, grads), (again, others) = found
    for site in plain.sites:
        assert plain[site].equal(again[site])
    for one, other in zip(grads, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


# --- afterwards ---------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_broken_pass_leaves_nothing(model, error):
    """After an exception inside iteration 0, the next pass of the block is whole; no hook stays."""
    wanted = traced(model, em.Mask(PLACE, [3]))
    experts = model.get_submodule(f"{PLACE}.experts")

    def fail(*_):
        raise error

    with em.record(model, em.Mask(PLACE, [3])) as trace:
        hook = experts.register_forward_pre_hook(fail)
        with pytest.raises(error):
            logits_of(model)
        hook.remove()
        logits_of(model)
    for site in wanted.sites:
        assert wanted[site].equal(trace[site])
    hook = experts.register_forward_pre_hook(fail)
    with pytest.raises(error):
        traced(model, em.Mask(PLACE, [3]))
    hook.remove()
    assert hooks(model) == 0
    assert torch.overrides._len_torch_function_stack() == 0


def test_outside_of_an_iteration_nothing_is_edited():
    """The shared experts called by themselves are nobody's site."""
    model = made()
    experts = model.get_submodule(f"{PLACE}.experts")
    asked = torch.randn(3, 32), torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2)
    with torch.no_grad():
        wanted = experts(*asked)
        with em.record(model, em.Ablate(PLACE, [0])):
            logits_of(model)
            assert torch.equal(experts(*asked), wanted)


def test_whether_it_is_attached():
    """A chain that is recorded says so."""
    moe = TransformersMoE(made())
    with em.record(moe):
        assert moe.attached
    assert not moe.attached


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # asked by PEFT
def test_adapters_beside_a_chain():
    """With LoRA adapters on it, a chain keeps a site per iteration, and so does PEFT's wrapper."""
    model = made(n_shared_experts=1)
    wanted = sites_of(model)
    before = logits_of(model)
    config = LoraConfig(target_modules=["up_proj"], target_parameters=["gate.weight"])
    wrapped = get_peft_model(model, config)
    assert sites_of(wrapped) == wanted
    with spied(model) as got, em.record(wrapped, em.Ablate(LATER, [0]), logits=True) as trace:
        wrapped(IDS)
    assert all(torch.equal(trace[site].weights, weights) for site, (_, weights) in got.items())
    assert torch.equal(logits_of(wrapped), before)


def test_routed_adapters_beside_a_chain(tmp_path):
    """A model with routed adapters has their sites and every iteration's, in the model's order."""
    model = made(n_shared_experts=1)
    wanted = sites_of(model)
    em.compose(model, tiny_adapters(tmp_path, model, ["a", "b"], targets=["q_proj"]))
    found = sites_of(model)
    assert [site for site in found if site.rpartition("#")[0].endswith("mlp")] == wanted
    assert len(found) > len(wanted)
    trace = traced(model, em.Ablate(LATER, [0]))
    assert not trace[LATER].chosen()[:, 0].any()
