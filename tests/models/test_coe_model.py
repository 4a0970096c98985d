"""The language model: what it gives, what it saves, and that it is the families' own attention."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from expertmix.models.coe import CoeConfig, CoeForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 24,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-6,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "max_position_embeddings": 64,
}
MLA = {
    "attention": "mla",
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
ATTENTIONS = [{"attention": name} for name in ("llama", "olmoe", "qwen2", "qwen3")] + [MLA]


def made(**changed: Any) -> CoeForCausalLM:
    torch.manual_seed(0)
    model = CoeForCausalLM(CoeConfig(**(SIZES | {"initializer_range": 0.2} | changed)))
    return model.eval()


def ids(rows: int = 2, count: int = 9) -> Tensor:
    return torch.randint(3, 60, (rows, count), generator=torch.Generator().manual_seed(1))


FAMILIES: list[tuple[Any, Any, dict[str, Any], dict[str, Any]]] = [
    (OlmoeConfig, OlmoeForCausalLM, {"intermediate_size": 24}, {"attention": "olmoe"}),
    (MixtralConfig, MixtralForCausalLM, {"sliding_window": None}, {"norm_topk_prob": True}),
    (
        Qwen2MoeConfig,
        Qwen2MoeForCausalLM,
        {"shared_expert_intermediate_size": 20, "norm_topk_prob": False},
        {
            "attention": "qwen2",
            "shared_expert_intermediate_size": 20,
            "shared_expert_gate": True,
        },
    ),
    (
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        {"norm_topk_prob": True, "head_dim": 8},
        {"attention": "qwen3", "norm_topk_prob": True},
    ),
]


def ours_from(theirs: PreTrainedModel, **changed: Any) -> CoeForCausalLM:
    """A CoE of one iteration with their weights."""
    model = made(num_iterations=1, router_float32=False, **changed)
    weights = {}
    for name, tensor in theirs.state_dict().items():
        name = name.replace("post_attention_layernorm", "mlp.iterations.0.norm")
        name = name.replace("mlp.gate.", "mlp.iterations.0.gate.")
        weights[name.replace("shared_expert.", "shared_experts.")] = tensor
    model.load_state_dict(weights)
    return model


@pytest.mark.parametrize(("config", "family", "theirs", "ours"), FAMILIES)
def test_one_iteration_is_the_family(
    config: Any, family: Any, theirs: dict[str, Any], ours: dict[str, Any]
) -> None:
    """With C = 1, their weights and their products, logits are the family's own, bit for bit."""
    torch.manual_seed(0)
    other = family(config(**(SIZES | {"initializer_range": 0.2} | theirs))).eval()
    model = ours_from(other, rope_parameters=other.config.rope_parameters, **ours)
    with torch.no_grad():
        assert_close(model(ids()).logits, other(ids()).logits, rtol=1e-5, atol=2e-6)
        model.set_experts_implementation("grouped_mm")
        assert torch.equal(model(ids()).logits, other(ids()).logits)


@pytest.mark.parametrize("rank", [None, 12])
@pytest.mark.parametrize("groups", [{}, {"n_group": 4, "topk_group": 2}], ids=["all", "groups"])
def test_one_iteration_is_deepseek(rank: int | None, groups: dict[str, int]) -> None:
    """So it is for DeepSeek-V2, to rounding: its top-k leaves the K experts in another order."""
    both = SIZES | MLA | {"q_lora_rank": rank, "n_shared_experts": 2, "routed_scaling_factor": 1.5}
    del both["attention"], both["num_experts"]
    method = "group_limited_greedy" if groups else "greedy"
    torch.manual_seed(0)
    other = DeepseekV2ForCausalLM(
        DeepseekV2Config(
            **both, **groups, n_routed_experts=8, first_k_dense_replace=1, topk_method=method,
            initializer_range=0.2,
        )
    ).eval()  # fmt: skip
    model = made(**both, **groups, attention="mla", dense_layers=[0], num_iterations=1)
    weights = {
        name.replace("post_attention_layernorm", "mlp.iterations.0.norm").replace(
            "mlp.gate.", "mlp.iterations.0.gate."
        )
        if "layers.1." in name
        else name: tensor
        for name, tensor in other.state_dict().items()
    }
    model.load_state_dict(weights)
    with torch.no_grad():
        assert_close(model(ids()).logits, other(ids()).logits, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("changed", ATTENTIONS, ids=lambda one: one["attention"])
def test_the_cache_changes_nothing(changed: dict[str, Any]) -> None:
    """Greedy decoding with a cache is the full forward's arg max, also behind left padding."""
    model = made(**changed)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids()], 1)
    mask = (padded != 0).long()
    plain = model.generate(ids(), max_new_tokens=5, do_sample=False)
    behind = model.generate(padded, attention_mask=mask, max_new_tokens=5, do_sample=False)
    assert torch.equal(plain, behind[:, 3:])
    for at in range(9, 14):
        with torch.no_grad():
            following = model(plain[:, :at], use_cache=False).logits[:, -1].argmax(-1)
        assert torch.equal(following, plain[:, at])


@pytest.mark.parametrize("changed", ATTENTIONS, ids=lambda one: one["attention"])
def test_implementations_agree(changed: dict[str, Any]) -> None:
    """Eager and sdpa attention, and all products of experts, give the same logits."""
    model = made(**changed)
    found = []
    with torch.no_grad():
        for attention in ("eager", "sdpa"):
            model.set_attn_implementation(attention)
            for experts in ("eager", "batched_mm", "grouped_mm", "expertmix"):
                model.set_experts_implementation(experts)
                found.append(model(ids()).logits)
    for one in found[1:]:
        assert_close(one, found[0], rtol=1e-4, atol=1e-5)


def test_a_fresh_process_loads_it(tmp_path: Path) -> None:
    """Saved, and loaded by AutoModelForCausalLM elsewhere, it gives the same logits."""
    model = made(router_bias=True, iteration_scale=True, n_shared_experts=1)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        torch.save((ids(), model(ids()).logits), tmp_path / "wanted.pt")
    code = (
        "import sys, torch, expertmix.models.coe\n"
        "from transformers import AutoModelForCausalLM\n"
        "asked, wanted = torch.load(sys.argv[1] + '/wanted.pt')\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "torch.testing.assert_close(model(asked).logits, wanted, rtol=1e-5, atol=1e-6)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_router_logits_have_an_order() -> None:
    """There is one entry per router call: all iterations of a layer, then the next layer."""
    model = made(num_iterations=3)
    gates = [part.gate for layer in model.model.layers for part in layer.mlp.iterations]
    seen: list[Tensor] = []
    for gate in gates:
        gate.register_forward_hook(lambda _m, _a, given: seen.append(given[0]))
    found = model(ids(), output_router_logits=True).router_logits
    assert len(found) == 6
    assert all(torch.equal(one, other) for one, other in zip(found, seen, strict=True))


def test_router_losses_survive_a_cache() -> None:
    """Generation with output_router_logits runs, and gives what it gives without."""
    model = made()
    plain = model.generate(ids(), max_new_tokens=4, do_sample=False)
    model.config.output_router_logits = True
    assert torch.equal(model.generate(ids(), max_new_tokens=4, do_sample=False), plain)


def test_tied_embeddings(tmp_path: Path) -> None:
    """A tied head is the embedding, also after saving and loading."""
    made(tie_word_embeddings=True).save_pretrained(tmp_path)
    model = CoeForCausalLM.from_pretrained(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_checkpointing_changes_no_gradient() -> None:
    """Whole layers or single iterations computed again: gradients are the same."""
    grads = []
    for layers, iterations in ((False, False), (True, False), (False, True), (True, True)):
        model = made(checkpoint_iterations=iterations).train()
        if layers:
            model.activation_checkpointing_enable()
        model(ids(), labels=ids(), use_cache=False).loss.backward()
        grads.append({name: one.grad for name, one in model.named_parameters()})
    for other in grads[1:]:
        for name, found in grads[0].items():
            assert_close(other[name], found, rtol=1e-5, atol=1e-7)
