"""Tiny real models for tests: yours and ours.

Every model is built by transformers from a shrunken config with random, seeded weights, so it is
the real architecture and runs in milliseconds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

import expertmix.models.coe  # noqa: F401  transformers then knows the type `coe`
from expertmix.errors import ConfigError

NUM_EXPERTS = 10
TOP_K = 3
VOCAB = 96
LAYERS = 4

_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size"), 48),
    **dict.fromkeys(
        (
            "moe_intermediate_size", "expert_ffn_hidden_size", "shared_intermediate_size",
            "moe_shared_expert_intermediate_size", "shared_expert_intermediate_size",
        ), 24,
    ),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_heads"), 4),
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), NUM_EXPERTS
    ),
    **dict.fromkeys(
        (
            "num_experts_per_tok", "num_experts_per_token", "num_experts_per_topk", "moe_k",
            "moe_topk", "moe_top_k", "top_k_experts",
        ), TOP_K,
    ),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "n_groups"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "first_k_dense"), 1),
    **dict.fromkeys(("n_shared_experts", "moe_num_shared_experts", "num_shared_experts"), 1),
    "num_key_value_heads": 2, "head_dim": 8,
    "vocab_size": VOCAB, "vocab_size_per_layer_input": VOCAB,
    "max_position_embeddings": 128, "sliding_window": 16,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "qk_head_dim": 12, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 8,
    "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1,
    "mamba_expand": 2, "mamba_dt_rank": 8, "mamba_num_heads": 4, "mamba_head_dim": 16,
    "ssm_state_size": 8, "chunk_size": 8, "mamba_chunk_size": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "decoder_sparse_step": 1, "moe_layer_start_index": 1, "moe_layer_interval": 1,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "layer_types": None,
}  # fmt: skip

_MLA: dict[str, Any] = {"num_key_value_heads": 4, "head_dim": 4}
_GEMMA4 = {"enable_moe_block": True, "global_head_dim": 8, "hidden_size_per_layer_input": 8}
_QWEN4 = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}  # fmt: skip
_FAMILY_SIZES: dict[str, dict[str, Any]] = {
    "axk1": _MLA, "axk2": _MLA, "deepseek_v2": _MLA, "deepseek_v3": _MLA, "deepseek_v32": _MLA,
    "dots3_note_text": _MLA, "glm4_moe_lite": _MLA, "glm_moe_dsa": _MLA,
    "bailing_hybrid": {**_MLA, "layer_group_size": 2},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {
            "ffn_hidden_size": 24, "moe_num_experts": NUM_EXPERTS, "moe_top_k": TOP_K,
            "hidden_size": 32,
        },
    },
    "gemma4": _GEMMA4, "gemma4_text": _GEMMA4,
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 8},
    "kimi_linear": {
        **_MLA, "linear_head_dim": 8, "linear_num_heads": 4,
        "layer_types": ["linear_attention", "full_attention"] * 2,
    },
    "longcat_flash": {**_MLA, "zero_expert_num": 2},
    "phimoe": {"num_experts_per_tok": 2},  # its sparse mixer is written for two
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "qwen4_exp": _QWEN4, "qwen4_exp_text": _QWEN4,
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
    "inkling2_text": {"unpadded_vocab_size": VOCAB},
    "inkling2_loop_text": {
        "unpadded_vocab_size": VOCAB, "n_layers_per_attn_res_block": 1,
        "loop_layer_index_start": 1, "loop_layer_index_end": 3, "loop_num_passes": 2,
    },
}  # fmt: skip


def tiny_moe(model_type: str = "olmoe", *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A tiny random MoE of any family that transformers knows: see `tiny_lm`."""
    return tiny_lm(model_type, seed=seed, **overrides)


def tiny_adapters(
    folder: str | Path,
    model: PreTrainedModel,
    names: Sequence[str],
    *,
    rank: int = 4,
    targets: Sequence[str] = ("up_proj", "down_proj"),
) -> Path:
    """A library of LoRA adapters with random factors, as PEFT stores them.

    Args:
        folder: Made if need be; each adapter gets a folder of its name in it.
        model: The base that they fit.
        names: Of the adapters.
        rank: Of all of them; alpha is twice that.
        targets: Kinds of linear modules that they adapt.

    Returns:
        The folder.
    """
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank,
        "target_modules": list(targets), "base_model_name_or_path": "", "inference_mode": True,
    }  # fmt: skip
    for seed, name in enumerate(names):
        own = Path(folder) / name
        own.mkdir(parents=True)
        (own / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        save_file(_random_factors(model, targets, rank, seed), own / "adapter_model.safetensors")
    return Path(folder)


def _random_factors(
    model: PreTrainedModel, targets: Sequence[str], rank: int, seed: int
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and path.rpartition(".")[2] in targets:
            key = f"base_model.model.{path}.lora_"
            out, width = module.weight.shape
            tensors[f"{key}A.weight"] = torch.randn(rank, width, generator=generator) / width**0.5
            tensors[f"{key}B.weight"] = torch.randn(out, rank, generator=generator) / rank
    return tensors


def tiny_lm(model_type: str = "llama", *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A tiny random LM of any family that transformers knows, in evaluation mode.

    Args:
        model_type: The family's name in transformers, such as `olmoe` or `deepseek_v3`.
        seed: Of the random weights.
        overrides: Config fields to set differently.

    Raises:
        ConfigError: transformers has no such family.
    """
    try:
        config = AutoConfig.for_model(model_type)
    except ValueError as problem:
        raise ConfigError(f"transformers has no model type {model_type!r}") from problem
    text = getattr(config, "text_config", None)
    small: Any = _shrink(config if text is None else text, model_type, overrides)
    if text is not None:
        whole: Any = type(config)
        small = whole(text_config=small)
    torch.manual_seed(seed)
    build: Any = AutoModelForCausalLM.from_config
    model: PreTrainedModel = build(small)
    model.train(False)
    return model


def tiny_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer that fits every tiny model: one token per character; it adds no special ones."""
    specials = ("<pad>", "<s>", "</s>", "<unk>")
    characters = "\n" + "".join(chr(code) for code in range(32, 127))
    vocabulary = [*specials, *characters][:VOCAB]
    core = Tokenizer(WordLevel({token: i for i, token in enumerate(vocabulary)}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    pad, bos, eos, unk = specials
    make: Any = PreTrainedTokenizerFast
    tokenizer: PreTrainedTokenizerBase = make(
        tokenizer_object=core, pad_token=pad, bos_token=bos, eos_token=eos, unk_token=unk
    )
    return tokenizer


def _shrink(config: Any, model_type: str, overrides: dict[str, Any]) -> Any:
    known = config.to_dict()
    sizes = {**_SIZES, **_FAMILY_SIZES.get(model_type, {})}
    return type(config)(**{key: size for key, size in sizes.items() if key in known} | overrides)
