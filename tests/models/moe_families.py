"""Tiny random MoE models of the families that become chains, in the layouts they are stored in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    GenerationConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from .conftest import tiny_tokenizer

_SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1234.0},
}
_MLA: dict[str, Any] = {
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}
_QWEN: dict[str, Any] = {"num_experts": 6, "moe_intermediate_size": 16}
_YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0.7,
    "original_max_position_embeddings": 16, "beta_fast": 32, "beta_slow": 1,
}  # fmt: skip
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip

MODELS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "olmoe": (OlmoeConfig, {"num_experts": 6}),
    "olmoe, clipped, biased, renormalized, tied": (
        OlmoeConfig,
        {
            "num_experts": 6, "clip_qkv": 0.5, "attention_bias": True, "norm_topk_prob": True,
            "tie_word_embeddings": True,
        },
    ),
    "mixtral": (MixtralConfig, {"num_local_experts": 5}),
    "mixtral, wide heads, scaled rope, tied": (
        MixtralConfig,
        {
            "num_local_experts": 5, "head_dim": 12, "rope_parameters": _LLAMA3,
            "tie_word_embeddings": True, "sliding_window": 64, "hidden_act": "gelu",
        },
    ),
    "qwen2": (
        Qwen2MoeConfig,
        {**_QWEN, "shared_expert_intermediate_size": 24, "mlp_only_layers": [0]},
    ),
    "qwen2, no biases, tied": (
        Qwen2MoeConfig,
        {
            **_QWEN, "shared_expert_intermediate_size": 24, "qkv_bias": False,
            "norm_topk_prob": True, "tie_word_embeddings": True,
        },
    ),
    "qwen3": (Qwen3MoeConfig, {**_QWEN, "norm_topk_prob": True, "head_dim": 12}),
    "qwen3, sparse steps, biased, tied": (
        Qwen3MoeConfig,
        {**_QWEN, "decoder_sparse_step": 2, "attention_bias": True, "tie_word_embeddings": True},
    ),
    "deepseek, no q_lora": (DeepseekV2Config, {**_MLA, "q_lora_rank": None}),
    "deepseek, q_lora, groups, yarn, tied": (
        DeepseekV2Config,
        {
            **_MLA, "q_lora_rank": 16, "n_group": 4, "topk_group": 2,
            "topk_method": "group_limited_greedy", "routed_scaling_factor": 3.0,
            "n_shared_experts": 1, "rope_parameters": _YARN, "tie_word_embeddings": True,
            "attention_bias": True, "first_k_dense_replace": 0,
        },
    ),
}  # fmt: skip
LAYOUTS = ("apart", "fused")


def make_moe(folder: Path, kind: str, *, layout: str = "apart", **changes: Any) -> Path:
    """A model of `MODELS`, saved by transformers; `fused` as transformers keeps it in memory."""
    config_class, settings = MODELS[kind]
    dtype = changes.pop("dtype", torch.float32)
    shard = changes.pop("max_shard_size", "1GB")
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(
        config_class(**{**_SIZES, **settings, **changes}), dtype=dtype
    )
    _shake(model)
    model.generation_config = GenerationConfig(max_new_tokens=7, eos_token_id=2, pad_token_id=0)
    model.save_pretrained(folder, max_shard_size=shard)
    tiny_tokenizer().save_pretrained(folder)
    if layout == "fused":
        _fuse(folder, model)
    return folder


def _shake(model: Any) -> None:
    """Norms and biases are ones and zeros at the start, and would hide mistakes."""
    for name, weight in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            weight.data.add_(torch.randn_like(weight), alpha=0.3)


def _fuse(folder: Path, model: Any) -> None:
    stored = load_file(folder / "model.safetensors")
    state = {
        name: tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if name in stored or ".experts." in name or ".mlp.gate." in name
    }
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a folder."""
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def edit_config(folder: Path, **changes: Any) -> None:
    """Other values in a folder's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
