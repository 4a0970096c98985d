"""Every MoE causal LM of transformers obeys the laws of recording, or is refused by name."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path

import pytest
import torch
from surgery import remove, silence
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import expertmix as em
from expertmix.bindings.discovery import find_blocks
from expertmix.bindings.families import TESTED
from expertmix.bindings.transformers import TransformersMoE
from expertmix.errors import UnsupportedModelError, UnsupportedRuntimeError
from expertmix.testing import NUM_EXPERTS, tiny_moe

REFUSED = {
    "doge": "product keys pick rows of an embedding",
    "jetmoe": "tokens are sorted before the experts see them",
    "llama4": "scores multiply the input",
    "llama4_text": "scores multiply the input",
}
LOOPS = {"inkling2_loop_text"}
NOT_BUILT = {
    "bamba": "has no experts; its source only names them",
    "dots3_note": "a vision wrapper; its language model is dots3_note_text",
}
OWN = {"coe"}  # its laws are those of test_chain.py
BY_TOKEN_ID = {"deepseek_v4"}  # its first layers; nothing to re-select there
ROUTER_FEEDS_MORE = {"inkling_text", "zaya"}  # the router's other outputs reach past the experts
PROBABILITIES_FOR_LOGITS = {"gemma4", "gemma4_text"}  # what these families call router logits
WIDER_ROUTER = {"inkling_text", "zaya", "longcat_flash"}  # a gate row cannot be told from others


def _moe_types() -> list[str]:
    found = []
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        folder = Path(inspect.getsourcefile(CONFIG_MAPPING[model_type])).parent
        sources = (path.read_text() for path in folder.glob("modeling_*.py"))
        if any("experts" in source for source in sources):
            found.append(model_type)
    return found


MOE_TYPES = _moe_types()
PASSING = [m for m in MOE_TYPES if m not in {*REFUSED, *LOOPS, *NOT_BUILT}]
IDS = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=PASSING)
def family(request):
    model = tiny_moe(request.param)
    generator = torch.Generator().manual_seed(2)
    for name, tensor in [*model.named_buffers(), *model.named_parameters()]:
        if (
            ("bias" in name and "correction" in name)
            or "expert_bias" in name
            or "balancing" in name
        ):
            tensor.data.copy_(torch.rand(tensor.shape, generator=generator) * 0.3)
    for block in find_blocks(model):
        for parameter in block.router.parameters():
            if not parameter.any():  # some gates start at zero
                parameter.data.normal_(std=0.1, generator=generator)
    return request.param, model


def _logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def _editable(model):
    """The last block: editable in every family, and nothing routed follows it."""
    return find_blocks(model)[-1]


def test_recorded_is_what_the_experts_got(family, monkeypatch):
    """The trace holds, for every site, exactly the arguments of the experts' forward."""
    _, model = family
    got = {}
    for block in find_blocks(model):
        kind = type(block.experts)
        monkeypatch.setattr(kind, "forward", _spy(kind.forward, got))
    with torch.no_grad(), em.record(model) as trace:
        model(IDS)
    for block in find_blocks(model):
        indices, weights = got[id(block.experts)]
        decision = trace[block.info.site]
        assert torch.equal(decision.indices, indices.reshape(decision.indices.shape))
        assert torch.equal(decision.weights, weights.reshape(decision.weights.shape))
        assert decision.top_k == block.info.top_k


def _spy(forward, got):
    if getattr(forward, "is_spy", False):
        return forward

    def spy(self, hidden_states, top_k_index, top_k_weights):
        got[id(self)] = (top_k_index.clone(), top_k_weights.clone())
        return forward(self, hidden_states, top_k_index, top_k_weights)

    spy.is_spy = True
    return spy


def test_recording_changes_no_bit(family):
    """Logits with and without recording are equal bit for bit, and no hook is left."""
    _, model = family
    before = _logits(model)
    with em.record(model, logits=True):
        during = _logits(model)
    assert torch.equal(before, during)
    assert torch.equal(before, _logits(model))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_replay_reproduces_the_run(family):
    """Replaying a trace gives the same logits, also on a model whose routers were scrambled."""
    name, model = family
    with em.record(model) as trace:
        before = _logits(model)
    with em.record(model, em.Replay(trace)):
        assert torch.equal(before, _logits(model))
    if name in ROUTER_FEEDS_MORE:
        return
    scrambled = copy.deepcopy(model)
    for block in find_blocks(scrambled):
        for parameter in block.router.parameters():
            parameter.data.add_(torch.randn(parameter.shape))
    assert not torch.equal(before, _logits(scrambled))
    with em.record(scrambled, em.Replay(trace, any_model=True)):
        assert torch.equal(before, _logits(scrambled))


def test_ablate_is_an_expert_that_outputs_zero(family):
    """Ablating an expert equals zeroing its parameters."""
    _, model = family
    block = _editable(model)
    with em.record(model) as trace:
        _logits(model)
    indices = trace[block.info.site].indices
    expert = int(indices[indices < NUM_EXPERTS][0])  # longcat's identity experts have no parameters
    with em.record(model, em.Ablate(str(block.info.site), [expert])) as ablated:
        edited = _logits(model)
    brute = copy.deepcopy(model)
    silence(_editable(brute), expert)
    torch.testing.assert_close(edited, _logits(brute), rtol=1e-5, atol=1e-6)
    assert not ablated[block.info.site].chosen()[:, expert].any()


def test_mask_is_a_model_without_the_expert(family):
    """Masking an expert equals cutting it out of the model: the family's own rule chooses again."""
    name, model = family
    block = _editable(model)
    with em.record(model) as trace:
        before = _logits(model)
    expert = int(trace[block.info.site].indices[0, -1])
    with em.record(model, em.Mask(str(block.info.site), [expert])) as masked:
        edited = _logits(model)
    assert not (masked[block.info.site].indices == expert).any()
    assert not torch.equal(edited, before)
    if name in WIDER_ROUTER:
        return
    brute = copy.deepcopy(model)
    remove(_editable(brute), expert)
    torch.testing.assert_close(edited, _logits(brute), rtol=1e-4, atol=1e-5)


def test_logits_are_what_the_gate_gave(family):
    """Recorded logits are (tokens, experts), and the family's own where it reports any."""
    name, model = family
    with torch.no_grad(), em.record(model, logits=True) as trace:
        output = model(IDS, output_router_logits=True)
    recorded = [trace[site] for site in trace.sites]
    for decision in recorded:
        assert decision.logits is not None
        assert decision.logits.shape == (IDS.numel(), decision.num_experts)
        assert decision.logits.std() > 0
    own = getattr(output, "router_logits", None)
    if own and name not in PROBABILITIES_FOR_LOGITS:
        for logits in own:  # deepseek_v4 reports its scored layers only
            row = logits.reshape(IDS.numel(), -1)
            assert any(torch.equal(d.logits, row[:, : d.num_experts]) for d in recorded)


def test_decoding_records_what_a_full_pass_records(family):
    """Prefill and cached decoding choose the experts of one full pass over the same tokens."""
    _, model = family
    with torch.no_grad(), em.record(model) as whole:
        model(IDS)
    with torch.no_grad(), em.record(model) as stepped:
        cache = model(IDS[:, :5], use_cache=True).past_key_values
        model(IDS[:, 5:6], **{_cache_name(model): cache}, use_cache=True)
    assert torch.equal(stepped.tokens.position, torch.tensor([0, 1, 2, 3, 4] * 2 + [5, 5]))
    site = whole.sites[-1]
    order = torch.tensor([0, 1, 2, 3, 4, 7, 8, 9, 10, 11, 5, 12])
    same = whole[site].indices[order].sort(1).values == stepped[site].indices.sort(1).values
    assert same.float().mean() > 0.9  # rounding may flip a near tie


def _cache_name(model) -> str:
    names = inspect.signature(model.forward).parameters
    return "cache" if "cache" in names else "past_key_values"


@pytest.mark.parametrize("model_type", sorted(LOOPS))
def test_a_model_that_loops_says_so(model_type):
    """A site that runs twice in a pass is an error, not a silent loss of one decision."""
    model = tiny_moe(model_type)
    with pytest.raises(UnsupportedRuntimeError, match="ran twice"), em.record(model):
        _logits(model)


@pytest.mark.parametrize(
    ("model_type", "settings"), [("llama4_text", {}), ("jetmoe", {}), ("doge", {"is_moe": True})]
)
def test_refused_families_say_why(model_type, settings):
    """A family that routes in another way is refused with the reason."""
    with pytest.raises(UnsupportedModelError, match=r"docs/models\.md"):
        TransformersMoE(tiny_moe(model_type, **settings))


def test_the_packaged_list_is_what_passes():
    """`expertmix models` and the benchmark name the families that are tested here, and our own."""
    assert list(TESTED) == sorted([*PASSING, *OWN])


def test_docs_name_every_family():
    """docs/models.md lists exactly the families that are tested here, and all others by name."""
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    assert f"**{len(PASSING)} families**" in page
    missing = [name for name in MOE_TYPES if f"`{name}`" not in page]
    assert not missing
