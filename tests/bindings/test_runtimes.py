"""Everything around a model that can go between it and its hooks: works, or says that it cannot."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

import expertmix as em
from expertmix.bindings.transformers import TransformersMoE
from expertmix.errors import (
    ConfigError,
    InterventionError,
    UnsupportedModelError,
    UnsupportedRuntimeError,
)
from expertmix.testing import NUM_EXPERTS, VOCAB, tiny_moe

SITE = "model.layers.2.mlp"
IDS = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(3))
_PEFT = "ignore:`is_gradient_checkpointing` is deprecated"  # PEFT asks for it
GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


@pytest.fixture
def model():
    return tiny_moe("olmoe")


@torch.no_grad()
def traced(model, *interventions, **options):
    with em.record(model, *interventions, **options) as trace:
        model(input_ids=IDS)
    return trace


def hooks_of(model):
    return [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


# --- interruption and threads -------------------------------------------------------------------


def _interrupt(*inputs):
    raise KeyboardInterrupt


def test_an_interrupt_leaves_nothing_behind(model, monkeypatch):
    """After Ctrl-C in the middle of an edited block, no hook and no edit of a router remain."""
    monkeypatch.setattr(model.model.layers[2].mlp.experts, "forward", _interrupt)
    with pytest.raises(KeyboardInterrupt), em.record(model, em.Mask("*", [0])):
        model(IDS)
    assert torch.overrides._len_torch_function_stack() == 0
    assert not hooks_of(model)


def test_a_block_goes_on_after_an_interrupt(model):
    """Who catches Ctrl-C inside the block records the next pass as if nothing had been."""
    with torch.no_grad(), em.record(model, em.Mask("*", [0])) as trace:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model.model.layers[2].mlp.experts, "forward", _interrupt)
            with pytest.raises(KeyboardInterrupt):
                model(IDS)
        model(IDS)
    assert trace[SITE].equal(traced(model, em.Mask("*", [0]))[SITE])


def test_a_closed_generator_leaves_nothing_behind(model):
    """A generator that records and is closed early ends its block."""

    def steps():
        with em.record(model, em.Mask("*", [0])):
            yield

    running = steps()
    next(running)
    running.close()
    assert not hooks_of(model)


def test_threads_are_told_apart(model):
    """While one thread runs the model, another is refused, and what is kept is whole passes."""
    problems, inside, refused = [], threading.Event(), threading.Event()

    def second():
        inside.wait(5)
        try:
            model(IDS)
        except UnsupportedRuntimeError as problem:
            problems.append(str(problem))
        refused.set()

    def wait(module, args):
        inside.set()
        refused.wait(5)

    with torch.no_grad(), em.record(model, em.Mask("*", [0])) as trace:
        thread = threading.Thread(target=second)
        thread.start()
        handle = model.model.layers[1].register_forward_pre_hook(wait)
        model(IDS)
        handle.remove()
        thread.join()
    assert len(problems) == 1
    assert "another thread" in problems[0]
    assert len(trace) == IDS.numel()


# --- generation ---------------------------------------------------------------------------------


def test_speculative_decoding_names_places_right(model):
    """A rejected candidate's place is taken by the next token; the last of a place is the text."""
    ids = IDS[:1].repeat(1, 2)
    with em.record(model) as trace:
        out = model.generate(ids, prompt_lookup_num_tokens=3, **GREEDY)
    tokens = trace.tokens
    assert len(tokens) > out.shape[1] - 1  # some were rejected
    last = {int(p): int(t) for p, t in zip(tokens.position, tokens.token_id, strict=True)}
    text = out[0].tolist()
    assert [last[place] for place in range(len(text) - 1)] == text[:-1]


def test_speculative_decoding_replays(model):
    """A replayed place gets the decision of the token that stayed."""
    ids = IDS[:1].repeat(1, 2)
    with em.record(model, em.Ablate("*", [0, 1])) as trace:
        out = model.generate(ids, prompt_lookup_num_tokens=3, **GREEDY)
    with em.record(model, em.Replay(trace)):
        assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **GREEDY), out)
    with em.record(model, em.Replay(trace)):
        assert torch.equal(model.generate(ids, **GREEDY), out)


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")  # its name before 5.24
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_from_outside_keeps_its_places(model, name):
    """Tokens after a prefix that was read before the block stand behind it."""
    with torch.no_grad():
        cache = model(IDS, use_cache=True).past_key_values
        with em.record(model, em.Ablate(SITE, range(NUM_EXPERTS), positions=[10])) as trace:
            model(IDS[:, :3], **{name: cache})
    assert trace.tokens.position.tolist() == [9, 10, 11] * 2
    silent = (trace[SITE].weights == 0).all(1)
    assert silent.tolist() == [False, True, False] * 2


def test_packed_rows_are_no_padding(model):
    """Under a block-diagonal mask every token is real, though the last one sees but its own."""
    blocks = torch.block_diag(torch.ones(4, 4), torch.ones(5, 5)).tril().bool()
    with torch.no_grad(), em.record(model) as trace:
        model(IDS, attention_mask=blocks.expand(2, 1, 9, 9))
    assert trace.tokens.real.all()


def test_a_static_cache_knows_its_padding(model):
    """With a 4-D mask, left padding is told from tokens."""
    ids = IDS.clone()
    ids[0, :3] = 0
    with em.record(model) as trace:
        model.generate(
            ids, attention_mask=(ids != 0).long(), cache_implementation="static", **GREEDY
        )
    mine = trace.tokens.position[trace.tokens.sample == 0]
    assert mine.tolist() == [-1] * 3 + list(range(13))


# --- wrappers -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings(_PEFT)
def test_adapters_on_attention_change_no_site(model):
    """A PEFT model has the sites of its base, in `forward`, `generate` and `backward`."""
    from peft import LoraConfig, get_peft_model

    sites = em.sites(model)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2))
    assert em.sites(wrapped) == sites
    with em.record(wrapped, em.Mask(SITE, [0])) as trace:
        wrapped(input_ids=IDS, labels=IDS).loss.backward()
    assert not (trace[SITE].indices == 0).any()


@pytest.mark.filterwarnings("ignore::UserWarning", _PEFT)
def test_adapters_on_experts_and_router_change_no_site(model):
    """PEFT's wrappers around experts and router are seen through."""
    from peft import LoraConfig, get_peft_model

    sites, clean = em.sites(model), traced(model, em.Mask(SITE, [0]), logits=True)[SITE]
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]
    wrapped = get_peft_model(
        model, LoraConfig(target_modules=["q_proj"], target_parameters=names, r=2)
    )
    assert em.sites(wrapped) == sites
    found = traced(wrapped, em.Mask(SITE, [0]), logits=True)[SITE]
    assert found.equal(clean)
    assert torch.equal(found.logits, clean.logits)


@pytest.mark.filterwarnings("ignore::UserWarning", _PEFT)
def test_an_adapted_gate_is_one_gate():
    """With LoRA on a gate, logits are the sum, and an edit is of the sum."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(target_modules=["wg"], r=2, init_lora_weights=False)
    model = get_peft_model(tiny_moe("hunyuan_v1_moe"), lora)
    values = torch.linspace(-3, 3, NUM_EXPERTS)
    apart = traced(model, logits=True)[SITE].logits
    edited = traced(model, em.Reweight(SITE, values, "logits"), logits=True)[SITE].logits
    model.merge_adapter()
    torch.testing.assert_close(traced(model, logits=True)[SITE].logits, apart)
    assert torch.equal(edited, values.expand_as(edited))


def test_the_full_model_that_routes_is_found(model):
    """A wrapper may hold a dense model too; the sites are those of the MoE."""
    from transformers import LlamaConfig, LlamaModel

    small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    dense = LlamaModel(
        LlamaConfig(num_hidden_layers=1, num_key_value_heads=2, vocab_size=32, **small)
    )
    assert em.sites(nn.ModuleList([dense, model])) == em.sites(model)


def test_an_offloaded_model_is_recorded_as_it_is(model):
    """accelerate's hooks around every module change no decision."""
    from accelerate import cpu_offload

    clean = traced(model, em.Mask(SITE, [0]), logits=True)[SITE]
    cpu_offload(model, execution_device="cpu")
    found = traced(model, em.Mask(SITE, [0]), logits=True)[SITE]
    assert found.equal(clean)
    assert torch.equal(found.logits, clean.logits)


def test_a_fingerprint_sees_every_router():
    """A changed gate row or correction bias is another model."""
    model = tiny_moe("deepseek_v3")
    gate = model.model.layers[3].mlp.gate
    seen = {TransformersMoE(model).fingerprint()}
    gate.e_score_correction_bias[1] += 1
    seen.add(TransformersMoE(model).fingerprint())
    with torch.no_grad():
        gate.weight[4] *= 2
    seen.add(TransformersMoE(model).fingerprint())
    assert len(seen) == 3


# --- gradient checkpointing ---------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_an_evaluation_before_the_backward_changes_no_gradient(model):
    """A recomputed block is edited by the addresses of its own pass, not of a later one."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    found = []
    for evaluates in (False, True):
        model.zero_grad()
        with em.record(model, em.Mask(SITE, [0, 1, 2, 3], positions=[0])):
            loss = model(IDS).logits.square().sum()
            if evaluates:
                with torch.no_grad():
                    model(IDS, attention_mask=(torch.arange(9) > 3).long().expand(2, 9))
            loss.backward()
        found.append(model.model.layers[2].mlp.gate.weight.grad.clone())
    assert torch.equal(*found)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_weight_gradients_need_the_graph_that_is_kept(model):
    """grad=True under re-entrant checkpointing would keep no gradient: it is refused."""
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.train()
    with em.record(model, grad=True), pytest.raises(UnsupportedRuntimeError, match="re-entrant"):
        model(IDS)


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.parametrize("part", ["model", "forward", "layer", "layer forward", "in place"])
def test_compiled_parts_are_refused_at_once(model, part):
    """However a model or a part of it was compiled, record says so before anything runs."""
    layer = model.model.layers[2]
    if part == "model":
        model = torch.compile(model, backend="eager")
    if part == "forward":
        model.forward = torch.compile(model.forward, backend="eager")
    if part == "layer":
        model.model.layers[2] = torch.compile(layer, backend="eager")
    if part == "layer forward":
        layer.mlp.forward = torch.compile(layer.mlp.forward, backend="eager")
    if part == "in place":
        layer.compile(backend="eager")
    with pytest.raises(UnsupportedRuntimeError, match="uncompiled"):
        em.record(model).__enter__()


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
@pytest.mark.parametrize("part", ["model", "layer"])
def test_compiling_inside_the_block_is_refused(model, part):
    """What is compiled while it is recorded raises out of the graph, not silently inside it."""
    with torch.no_grad(), em.record(model, em.Mask(SITE, [0])):
        run = torch.compile(lambda ids: model(ids).logits, backend="eager")
        if part == "layer":
            model.model.layers[2].mlp.compile(backend="eager")
            run = model
        with pytest.raises(UnsupportedRuntimeError, match="tracing"):
            run(IDS)
    torch._dynamo.reset()


def test_replaced_blocks_are_noticed(model, monkeypatch):
    """A pass in which no recorded layer ran is an error, not an empty trace."""
    for layer in model.model.layers:
        monkeypatch.setattr(layer.mlp, "forward", lambda hidden: hidden)
    with pytest.raises(UnsupportedRuntimeError, match="replaced by kernels"):
        traced(model)


def test_a_part_of_a_model_is_refused(model):
    """Without a full model around them, layers have no named tokens."""
    with pytest.raises(UnsupportedModelError, match="no full model"):
        em.record(nn.Sequential(model.model.layers[2])).__enter__()


def test_a_pass_without_tokens_is_refused(model):
    """The model's own input is what decisions are named by."""
    with em.record(model), pytest.raises(UnsupportedRuntimeError, match="neither input_ids"):
        model()


def test_interventions_are_given_one_by_one(model):
    """A list instead of interventions is told how to be passed."""
    with pytest.raises(ConfigError, match="one by one"):
        em.record(model, [em.Ablate("*", [0])]).__enter__()


def test_a_mask_may_not_empty_a_group():
    """Where the router limits itself to a group that has too few experts left, Mask says so."""
    model = tiny_moe("deepseek_v3", n_group=2, topk_group=1)
    with pytest.raises(InterventionError, match="groups"):
        traced(model, em.Mask("*.3.mlp", [0, 1, 2, 5, 6, 7]))
