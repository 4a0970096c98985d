"""Recording and editing one family in all the ways in which a model can run."""

from __future__ import annotations

import pytest
import torch

import expertmix as em
from expertmix.errors import (
    FingerprintError,
    InterventionError,
    NoSitesError,
    ReplayError,
    StageError,
    TraceError,
    UnknownExpertError,
    UnknownSiteError,
    UnsupportedRuntimeError,
)
from expertmix.testing import LAYERS, NUM_EXPERTS, TOP_K, VOCAB, tiny_moe

SITE = "model.layers.2.mlp"
GENERATOR = torch.Generator().manual_seed(3)
IDS = torch.randint(3, VOCAB, (2, 9), generator=GENERATOR)
IMPLEMENTATIONS = ["eager", "batched_mm", "grouped_mm"]


@pytest.fixture(scope="module")
def model():
    return tiny_moe("olmoe")


@torch.no_grad()
def logits_of(model, *interventions, ids=IDS, **inputs):
    with em.record(model, *interventions):
        return model(ids, **inputs).logits


@torch.no_grad()
def traced(model, *interventions, ids=IDS, options=None, **inputs):
    with em.record(model, *interventions, **(options or {})) as trace:
        model(ids, **inputs)
    return trace


def close(left, right):
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


# --- what is recorded ---------------------------------------------------------------------------


def test_a_trace_names_its_tokens(model):
    """Sample, position and id of every token are those of the input, row by row."""
    tokens = traced(model).tokens
    assert torch.equal(tokens.token_id, IDS.flatten())
    assert torch.equal(tokens.sample, torch.arange(2).repeat_interleave(9))
    assert torch.equal(tokens.position, torch.arange(9).repeat(2))
    assert tokens.real.all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_decision(model, side):
    """A padded row gets the decisions it gets alone, and its padding has position -1."""
    alone = traced(model, ids=IDS[:1, :6])
    padding = torch.zeros(1, 3, dtype=torch.int64)
    row = [padding, IDS[:1, :6]] if side == "left" else [IDS[:1, :6], padding]
    ids = torch.cat([torch.cat(row, 1), IDS[1:]])
    mask = (ids != 0).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    batch = traced(model, ids=ids, attention_mask=mask, position_ids=positions)
    mine = batch.tokens.real & (batch.tokens.sample == 0)
    assert torch.equal(batch.tokens.position[mine], torch.arange(6))
    assert (batch.tokens.position[~batch.tokens.real] == -1).all()
    assert torch.equal(batch[SITE].rows(mine).indices, alone[SITE].indices)
    close(batch[SITE].rows(mine).weights, alone[SITE].weights)


@pytest.mark.parametrize("side", ["left", "right"])
def test_generate_appends_to_the_samples_of_the_prompt(model, side):
    """Generation with a cache records prompt and answer as one sequence per row."""
    ids = IDS.clone()
    if side == "left":
        ids[0, :3] = 0
    mask = (ids != 0).long()
    with em.record(model) as trace:
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False
        )
    for row in range(2):
        mine = trace.tokens.real & (trace.tokens.sample == row)
        length = int(mask[row].sum())
        assert trace.tokens.position[mine].tolist() == list(range(length + 3))
        whole = out[row][-(length + 4) : -1]
        assert torch.equal(trace.tokens.token_id[mine], whole)


def test_generate_decides_as_one_full_pass(model):
    """The decisions of prefill and decoding are those of a pass over the finished text."""
    with em.record(model) as stepped:
        out = model.generate(
            IDS[:1], max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0
        )
    whole = traced(model, ids=out[:, :-1])
    assert torch.equal(stepped.tokens.token_id, whole.tokens.token_id)
    assert torch.equal(stepped[SITE].indices, whole[SITE].indices)
    close(stepped[SITE].weights, whole[SITE].weights)


def test_samples_are_numbered_across_calls(model):
    """Each call without a cache begins new samples."""
    with torch.no_grad(), em.record(model, labels=["a", "b", "c"]) as trace:
        model(IDS)
        model(IDS[:1])
    assert trace.tokens.sample.unique().tolist() == [0, 1, 2]
    assert trace.labels == {0: "a", 1: "b", 2: "c"}


def test_embeddings_instead_of_ids(model):
    """Inputs given as embeddings are recorded with id -1."""
    embeds = model.get_input_embeddings()(IDS)
    with torch.no_grad(), em.record(model) as trace:
        model(inputs_embeds=embeds)
    assert (trace.tokens.token_id == -1).all()
    assert torch.equal(trace[SITE].indices, traced(model)[SITE].indices)


def test_the_inner_model_may_be_called(model):
    """`model.model(...)` is recorded like `model(...)`."""
    with torch.no_grad(), em.record(model) as trace:
        model.model(IDS)
    assert trace[SITE].equal(traced(model)[SITE])


def test_text_is_kept_when_a_tokenizer_is_given(model):
    """Token strings and the tokenizer's name are in the trace then, and only then."""

    class Letters:
        name_or_path = "somewhere/letters"

        def convert_ids_to_tokens(self, ids):
            return [chr(id_) for id_ in ids]

    trace = traced(model, options={"tokenizer": Letters()})
    assert trace.text == tuple(chr(id_) for id_ in IDS.flatten().tolist())
    assert trace.meta.settings["tokenizer"] == "letters (Letters)"
    assert traced(model).text is None


def test_only_matching_sites_are_recorded(model):
    """`sites=` limits what is kept; interventions act elsewhere all the same."""
    trace = traced(model, em.Ablate("*.0.mlp", [0]), options={"sites": "layers.[23].mlp"})
    assert [site.name for site in trace.sites] == ["model.layers.2.mlp", "model.layers.3.mlp"]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_experts_implementation(implementation):
    """Decisions and edits do not depend on how the experts are computed."""
    model = tiny_moe("olmoe")
    reference = traced(model)
    expert = int(reference[SITE].indices[0, 0])
    ablated = logits_of(model, em.Ablate(SITE, [expert]))
    model.set_experts_implementation(implementation)
    assert torch.equal(traced(model)[SITE].indices, reference[SITE].indices)
    close(logits_of(model, em.Ablate(SITE, [expert])), ablated)
    own = traced(model)
    assert torch.equal(logits_of(model, em.Replay(own)), logits_of(model))


def test_bfloat16_replays_bit_for_bit():
    """Weights in bfloat16 survive the trace exactly."""
    model = tiny_moe("olmoe").to(torch.bfloat16)
    trace = traced(model)
    assert torch.equal(logits_of(model), logits_of(model, em.Replay(trace)))


def test_inference_mode(model):
    """Recording and editing work under inference mode."""
    with torch.inference_mode(), em.record(model, em.Mask(SITE, [1])) as trace:
        model(IDS)
    assert not (trace[SITE].indices == 1).any()


# --- nesting, repetition, failure ---------------------------------------------------------------


def test_nested_blocks_see_what_the_experts_got(model):
    """Both traces of nested blocks hold the decision after all edits; outer edits come first."""
    first = int(traced(model)[SITE].indices[0, 0])
    outer_edit, inner_edit = em.Ablate(SITE, [first]), em.Mask(SITE, [(first + 1) % NUM_EXPERTS])
    with torch.no_grad(), em.record(model, outer_edit) as outer:
        with em.record(model, inner_edit) as inner:
            nested = model(IDS).logits
        after = model(IDS).logits
    assert torch.equal(nested, logits_of(model, outer_edit, inner_edit))
    assert torch.equal(after, logits_of(model, outer_edit))
    assert len(outer) == 2 * len(inner)
    assert outer[SITE].rows(torch.arange(18)).equal(inner[SITE])


def test_an_exception_leaves_nothing_behind(model):
    """After an error in the block or in the model no hook and no half pass remain."""
    before = logits_of(model)
    block = em.record(model, em.Mask("*", [0]))
    with pytest.raises(ZeroDivisionError), block:
        _run_and_break(model)
    unknown = torch.full((1, 3), VOCAB + 7)
    with torch.no_grad(), em.record(model, em.Mask("*", [0])) as trace:
        with pytest.raises(IndexError):
            model(unknown)
        model(IDS)
    assert len(trace) == IDS.numel()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(before, model(IDS).logits)


def _run_and_break(model):
    model(IDS)
    raise ZeroDivisionError


def test_a_failing_layer_pops_the_edit_of_its_router(model, monkeypatch):
    """When an expert fails in the middle of an edited block, torch functions are left untouched."""
    monkeypatch.setattr(model.model.layers[2].mlp.experts, "forward", _fail)
    with em.record(model, em.Mask("*", [0])), pytest.raises(RuntimeError, match="experts broke"):
        model(IDS)
    assert torch.overrides._len_torch_function_stack() == 0


def _fail(hidden_states, top_k_index, top_k_weights):
    raise RuntimeError("experts broke")


# --- interventions ------------------------------------------------------------------------------


def test_mask_is_the_selection_among_the_others(model):
    """Masked: softmax and top-k over the remaining logits, in float64."""
    with torch.no_grad(), em.record(model, em.Mask("*.0.mlp", [4, 7]), logits=True) as trace:
        model(IDS)
    decision = trace["model.layers.0.mlp"]
    assert torch.isinf(decision.logits[:, [4, 7]]).all()
    clean = traced(model, options={"logits": True})["model.layers.0.mlp"].logits.double()
    clean[:, [4, 7]] = -torch.inf
    weights, indices = clean.softmax(1).topk(TOP_K)
    assert torch.equal(decision.indices, indices)
    close(decision.weights.double(), weights)


def test_reweight_logits_is_a_bias_on_the_gate(model):
    """Adding to a logit is what a bias of the gate would do."""
    bias = torch.linspace(-2, 2, NUM_EXPERTS)
    edited = traced(
        model, em.Reweight("*.0.mlp", bias, "logits", mode="add"), options={"logits": True}
    )
    clean = traced(model, options={"logits": True})["model.layers.0.mlp"]
    weights, indices = (clean.logits.double() + bias).softmax(1).topk(TOP_K)
    assert torch.equal(edited["model.layers.0.mlp"].indices, indices)
    close(edited["model.layers.0.mlp"].weights.double(), weights)


def test_reweight_probabilities_selects_by_what_is_given(model):
    """Probabilities that are set decide the selection and the weights."""
    given = torch.arange(NUM_EXPERTS) / 45
    decision = traced(model, em.Reweight(SITE, given, "probabilities"))[SITE]
    assert (decision.indices == torch.tensor([9, 8, 7])).all()
    close(decision.weights, given[[9, 8, 7]].expand(18, 3))


def test_reweight_weights_is_the_decision(model):
    """Weights that are set after top-k are what the experts get; a zero is not called."""
    given = torch.zeros(NUM_EXPERTS)
    given[[2, 5]] = torch.tensor([0.75, 0.25])
    trace = traced(model, em.Reweight(SITE, given, "weights"))
    close(trace[SITE].dense(), given.expand(18, NUM_EXPERTS))


def test_reweight_may_call_more_than_k_experts(model):
    """A dense decision is the weighted sum of all experts, computed one by one."""
    given = torch.rand(NUM_EXPERTS, generator=GENERATOR)
    edited = logits_of(model, em.Reweight("*.3.mlp", given, "weights"))
    experts = model.model.layers[3].mlp.experts
    inputs = []
    handle = experts.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    logits_of(model)
    handle.remove()
    index = torch.arange(NUM_EXPERTS).expand(18, NUM_EXPERTS)
    dense = sum(
        given[e] * experts(inputs[0], index[:, [e]], torch.ones(18, 1)) for e in range(NUM_EXPERTS)
    )
    handle = experts.register_forward_hook(lambda module, args, output: dense)
    brute = logits_of(model)
    handle.remove()
    close(edited, brute)


def test_scale_touches_only_the_selected(model):
    """Scaling after top-k changes weights of selected experts and selects nobody."""
    clean = traced(model)[SITE]
    factors = torch.arange(NUM_EXPERTS) / 4.0
    edited = traced(model, em.Reweight(SITE, factors, "weights", mode="scale"))[SITE]
    assert torch.equal(edited.indices, clean.indices)
    close(edited.weights, clean.weights * factors[clean.indices])


def test_replay_needs_every_token(model):
    """A token without a recorded decision is an error, or keeps the router's own on request."""
    trace = traced(model, ids=IDS[:, :5])
    with pytest.raises(ReplayError, match="position 5"):
        logits_of(model, em.Replay(trace))
    kept = traced(model, em.Replay(trace, missing="keep"))
    assert torch.equal(kept[SITE].indices, traced(model)[SITE].indices)
    assert kept[SITE].rows(kept.tokens.position < 5).equal(trace[SITE])


def test_replay_forces_nothing_where_a_site_did_not_run(model, monkeypatch):
    """A token for which a site was skipped has no decision there: an error, not silence."""
    with torch.no_grad(), em.record(model) as trace, monkeypatch.context() as patch:
        patch.setattr(model.model.layers[2].mlp, "forward", lambda hidden: hidden)
        model(IDS)
    with torch.no_grad(), em.record(model) as other:
        model(IDS)
    partial = traced(model, em.Replay(trace, missing="keep", sites="*.[013].mlp"))
    assert len(partial) == IDS.numel()
    with pytest.raises(ReplayError, match=r"layers\.2\.mlp"):
        logits_of(model, em.Replay(trace))
    kept = traced(model, em.Replay(trace, missing="keep", sites=SITE))
    assert kept[SITE].equal(other[SITE])


def test_replay_of_a_dense_decision(model):
    """A trace in which some tokens got more than K experts replays bit for bit."""
    given = torch.rand(NUM_EXPERTS, generator=GENERATOR)
    edit = em.Reweight(SITE, given, "weights", positions=[3])
    with torch.no_grad(), em.record(model, edit) as trace:
        dense = model(IDS).logits
    assert trace[SITE].top_k == NUM_EXPERTS
    assert torch.equal(logits_of(model, em.Replay(trace)), dense)


def test_a_trace_streams_to_a_file(model, tmp_path):
    """`to=` writes what memory would hold, and only when the block ends well."""
    path = tmp_path / "trace.parquet"
    with torch.no_grad(), em.record(model, to=path) as streamed:
        model(IDS)
        model(IDS[:1])
        assert not path.exists()
    with torch.no_grad(), em.record(model) as held:
        model(IDS)
        model(IDS[:1])
    assert all(streamed[site].equal(held[site]) for site in held.sites)
    assert torch.equal(logits_of(model, em.Replay(em.Trace.load(path))), logits_of(model))


def test_replay_finds_tokens_under_other_padding(model):
    """A trace recorded without padding replays in a padded batch."""
    trace = traced(model, em.Ablate(SITE, [0, 1, 2, 3]))
    padding = torch.zeros(2, 2, dtype=torch.int64)
    ids = torch.cat([padding, IDS], 1)
    mask = (ids != 0).long()
    replayed = traced(model, em.Replay(trace), ids=ids, attention_mask=mask)
    assert replayed[SITE].rows(replayed.tokens.real).equal(trace[SITE])


def test_a_trace_of_another_model_is_refused(model):
    """Replay checks the fingerprint before anything runs."""
    trace = traced(tiny_moe("olmoe", seed=9))
    with pytest.raises(FingerprintError, match="any_model"), em.record(model, em.Replay(trace)):
        pass


@pytest.mark.parametrize(
    "edit",
    [
        em.Ablate(SITE, [0, 1, 2, 3, 4], positions=[2, -1], samples=[1]),
        em.Mask(SITE, [0, 1, 2, 3], positions=[2, -1], samples=[1]),
        em.Reweight(SITE, torch.ones(NUM_EXPERTS), "weights", positions=[2, -1], samples=[1]),
        em.Reweight(
            SITE, torch.linspace(0, 9, NUM_EXPERTS)[None], "logits", positions=[2, -1], samples=[1]
        ),
    ],
    ids=lambda edit: f"{edit.kind}-{sorted(edit.stages)[0]}",
)
def test_only_addressed_tokens_change(model, edit):
    """Every other token of the site keeps its decision bit for bit, in any stage."""
    clean, edited = traced(model)[SITE], traced(model, edit)[SITE]
    changed = (clean.dense() != edited.dense()).any(1).nonzero().flatten().tolist()
    assert set(changed) <= {9 + 2, 9 + 8}
    assert changed


def test_a_token_mask_addresses_tokens(model):
    """mask[row][position] edits exactly those tokens, also while decoding."""
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[0, 1] = mask[1, 10] = True
    edit = em.Ablate(SITE, range(NUM_EXPERTS), mask=mask)
    with em.record(model, edit) as trace:
        model.generate(IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    silent = (trace[SITE].weights == 0).all(1)
    found = torch.stack([trace.tokens.sample, trace.tokens.position], 1)[silent].tolist()
    assert found == [[0, 1], [1, 10]]


def test_interventions_compose_in_order(model):
    """Two edits of one stage apply in the order given; stages keep the router's order."""
    double = em.Reweight(SITE, torch.full((NUM_EXPERTS,), 2.0), "weights", mode="scale")
    shift = em.Reweight(SITE, torch.ones(NUM_EXPERTS), "weights", mode="add")
    clean = traced(model)[SITE].weights
    close(traced(model, double, shift)[SITE].weights, 2 * clean + 1)
    close(traced(model, em.InOrder(shift, double))[SITE].weights, 2 * (clean + 1))


# --- gradients ----------------------------------------------------------------------------------


def test_weights_have_gradients_when_asked():
    """With grad=True the gradient of a loss by a routing weight is <dL/d(output), its expert>."""
    model = tiny_moe("olmoe").requires_grad_(False)
    experts = model.model.layers[2].mlp.experts
    seen = {}

    def keep(module, args, output):
        output.retain_grad()
        seen.update(hidden=args[0].detach(), output=output)

    handle = experts.register_forward_hook(keep)
    with em.record(model, grad=True) as trace:
        model(IDS).logits.square().sum().backward()
    handle.remove()
    decision = trace[SITE]
    for slot in range(TOP_K):
        alone = experts(seen["hidden"], decision.indices[:, [slot]], torch.ones(18, 1))
        close(decision.weights.grad[:, slot], (seen["output"].grad * alone).sum(1))


def test_gradients_reach_given_values(model):
    """Values of a Reweight receive gradients, at every stage."""
    for stage in ("logits", "probabilities", "weights"):
        values = torch.linspace(0.1, 0.2, NUM_EXPERTS).requires_grad_()
        with em.record(model, em.Reweight(SITE, values, stage)):
            model(IDS).logits.sum().backward()
        assert values.grad is not None
        assert values.grad.abs().sum() > 0


def test_joined_gradients_are_refused(model):
    """Over two passes, joined weights are not the tensors the model used; the trace says so."""
    with em.record(model, grad=True) as trace:
        model(IDS)
        model(IDS)
    with pytest.raises(TraceError, match="2 passes"):
        trace[SITE]
    assert len(list(trace.chunks())) == 2


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_records_once(reentrant):
    """Recomputation in the backward pass is edited like the forward and recorded once."""
    model = tiny_moe("olmoe")
    edit = em.Mask(SITE, [0, 3], positions=[1, 2, 3])
    with em.record(model, edit):
        model(IDS).logits.sum().backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    with em.record(model, edit) as trace:
        model(IDS).logits.sum().backward()
    assert len(trace) == IDS.numel()
    for name, parameter in model.named_parameters():
        if name in plain:
            close(parameter.grad, plain[name])


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_recomputing_two_passes_is_refused():
    """Two passes before one backward cannot be told apart; an edit then says so."""
    model = tiny_moe("olmoe")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    with em.record(model, em.Mask(SITE, [0])):
        loss = model(IDS).logits.sum() + model(IDS).logits.sum()
        with pytest.raises(UnsupportedRuntimeError, match="after each forward"):
            loss.backward()


# --- what is refused ----------------------------------------------------------------------------


def test_unknown_sites_list_near_names(model):
    """A pattern that matches nothing raises before the model runs."""
    with pytest.raises(UnknownSiteError, match=r"model\.layers\.1\.mlp"):
        em.record(model, em.Ablate("model.layer.1.mlp", [0])).__enter__()
    with pytest.raises(UnknownSiteError):
        em.record(model, sites="nowhere").__enter__()


def test_unknown_experts_are_named(model):
    """An expert that does not exist raises with the site and its range."""
    with pytest.raises(UnknownExpertError, match=r"mlp#0 has experts 0 to 9, not 10"):
        em.record(model, em.Mask("*", [10])).__enter__()


def test_a_mask_must_leave_enough(model):
    """Masks that leave fewer than K experts are refused, alone and together."""
    with pytest.raises(InterventionError, match="leaves 2 experts"):
        em.record(model, em.Mask("*", range(8))).__enter__()
    with pytest.raises(InterventionError, match="together leave 2"):
        logits_of(model, em.Mask("*", range(4)), em.Mask("*", range(4, 8)))


def test_a_stage_that_a_router_lacks_is_named():
    """gpt_oss selects on logits: there are no probabilities before its top-k."""
    model = tiny_moe("gpt_oss")
    with pytest.raises(StageError, match="probabilities"):
        logits_of(model, em.Reweight("*", torch.ones(NUM_EXPERTS), "probabilities"))


def test_token_id_routers_cannot_select_again():
    """deepseek_v4's first layers look experts up by token id: edits work after that only."""
    model = tiny_moe("deepseek_v4")
    with pytest.raises(InterventionError, match="token id"):
        logits_of(model, em.Mask("*.layers.0.mlp", [0]))
    logits_of(model, em.Ablate("*.layers.0.mlp", [0]))


def test_a_dense_model_is_told_apart():
    """A model without experts raises NoSitesError, which says what to do."""
    from transformers import LlamaConfig, LlamaForCausalLM

    dense = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, vocab_size=32,
        )
    )  # fmt: skip
    with pytest.raises(NoSitesError, match="expertmix convert"):
        em.record(dense).__enter__()


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_a_compiled_model_is_refused(model):
    """torch.compile hides the model from hooks; record says so at once."""
    with pytest.raises(UnsupportedRuntimeError, match="uncompiled"):
        em.record(torch.compile(model)).__enter__()


def test_a_layer_alone_is_refused(model):
    """Calling a block without the model leaves no way to name its tokens."""
    with em.record(model, em.Ablate("*", [0])), pytest.raises(UnsupportedRuntimeError):
        model.model.layers[0].mlp(torch.zeros(1, 2, 32))


def test_sites_are_listed(model):
    """`em.sites` gives every routed block with E and K, in order."""
    found = em.sites(model)
    assert [info.site.name for info in found] == [f"model.layers.{i}.mlp" for i in range(LAYERS)]
    assert {(info.num_experts, info.top_k) for info in found} == {(NUM_EXPERTS, TOP_K)}


# --- group-limited selection --------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["deepseek_v3", "deepseek_v2"])
def test_masking_inside_groups(model_type):
    """With expert groups, a mask is the family's rule on the scores of the others, in float64."""
    extra = {"topk_method": "group_limited_greedy"} if model_type == "deepseek_v2" else {}
    model = tiny_moe(model_type, n_group=2, topk_group=1, **extra)
    site = "model.layers.3.mlp"
    clean = traced(model, options={"logits": True})[site]
    expert = int(clean.indices[0, 0])
    masked = traced(model, em.Mask(site, [expert]))[site]
    scores = _family_scores(model_type, clean.logits.double())
    scores[:, expert] = -torch.inf
    grouped = scores.view(18, 2, 5)
    strength = grouped.amax(2) if model_type == "deepseek_v2" else grouped.topk(2).values.sum(2)
    best = strength.argmax(1)
    other = torch.arange(NUM_EXPERTS)[None] // 5 != best[:, None]
    expected = scores.masked_fill(other, -torch.inf).topk(TOP_K).indices
    assert torch.equal(masked.indices.sort(1).values, expected.sort(1).values)


def _family_scores(model_type, logits):
    return logits.softmax(1) if model_type == "deepseek_v2" else logits.sigmoid()
