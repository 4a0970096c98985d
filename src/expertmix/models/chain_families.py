"""Which families of MoE a Chain-of-Experts can repeat exactly, and with which settings.

Knows configs of transformers' families; no tensor, no file. A chain with these settings whose first
iteration has the family's norm and router, and whose others have a scale of zero, computes what
transformers computes for the family: also where its authors' own code differs (DeepSeek-V2's
`norm_topk_prob`, which transformers ignores).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from expertmix.errors import CheckpointError, ConfigError, UnsupportedModelError
from expertmix.models.coe import CoeConfig

Settings = dict[str, Any]

# The same in every family and in a CoE.
_COPIED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps",
    "tie_word_embeddings", "rope_parameters", "num_experts_per_tok",
)  # fmt: skip
# Of no influence on what an evaluated model computes: they may change after the conversion.
_FREE = (
    "initializer_range", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id",
    "attention_dropout", "router_aux_loss_coef", "dtype", "expert_names",
)  # fmt: skip
# A chain whose first iteration is a plain pre-norm MoE.
_CHAIN: Settings = {
    "gating": "independent",
    "residual": "inner",
    "norm": "per_iteration",
    "shared_experts": "per_iteration",
    "iteration_scale": True,
    "scores": "softmax",
    "router_bias": False,
}
_REASONS = {
    "coe": "it is a Chain-of-Experts already (--to moe goes back)",
    "deepseek_v3": "its attention and its groups of experts are others than DeepSeek-V2's",
    "flex_olmo": "it normalizes after attention and experts",
    "gpt_oss": "it has attention sinks, sliding windows and biased, clamped experts",
    "granitemoe": "it multiplies embeddings, residuals and logits",
    "llama4": "its routers weigh what goes into an expert, not what comes out",
    "phimoe": "its norms have biases, and its router is sampled",
    "qwen3_next": "most of its attention is linear",
}
_DENSE = "it is dense. Make a MoE of it and LoRA adapters first: expertmix convert BASE LIBRARY"


def _olmoe(config: Any) -> Settings:
    return {
        "attention": "olmoe",
        "attention_bias": config.attention_bias,
        "clip_qkv": config.clip_qkv,
        "moe_intermediate_size": config.intermediate_size,
        "num_experts": config.num_experts,
        "norm_topk_prob": config.norm_topk_prob,
        "router_float32": False,
    }


def _mixtral(config: Any) -> Settings:
    return {
        "attention": "llama",
        "moe_intermediate_size": config.intermediate_size,
        "num_experts": config.num_local_experts,
        "norm_topk_prob": True,
        "router_float32": False,
        "weights_float32": True,
    }


def _qwen3(config: Any) -> Settings:
    return {
        "attention": "qwen3",
        "attention_bias": config.attention_bias,
        "moe_intermediate_size": config.moe_intermediate_size,
        "num_experts": config.num_experts,
        "norm_topk_prob": config.norm_topk_prob,
        "router_float32": False,
        "dense_layers": _dense_layers(config),
    }


def _qwen2(config: Any) -> Settings:
    return {
        "attention": "qwen2" if config.qkv_bias else "llama",
        "moe_intermediate_size": config.moe_intermediate_size,
        "num_experts": config.num_experts,
        "shared_expert_intermediate_size": config.shared_expert_intermediate_size,
        "shared_expert_gate": True,
        "norm_topk_prob": config.norm_topk_prob,
        "router_float32": False,
        "dense_layers": _dense_layers(config),
    }


def _dense_layers(config: Any) -> list[int]:
    return [
        layer
        for layer in range(config.num_hidden_layers)
        if layer in config.mlp_only_layers or (layer + 1) % config.decoder_sparse_step
    ]


def _deepseek_v2(config: Any) -> Settings:
    if config.mlp_bias:
        raise UnsupportedModelError("its MLPs have biases (mlp_bias), a CoE's have none")
    if config.topk_method not in ("greedy", "group_limited_greedy"):
        raise UnsupportedModelError(f"a CoE cannot choose experts by {config.topk_method!r}")
    limited = config.topk_method == "group_limited_greedy"
    mla = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    return {
        "attention": "mla",
        "attention_bias": config.attention_bias,
        **{key: getattr(config, key) for key in mla},
        "moe_intermediate_size": config.moe_intermediate_size,
        "num_experts": config.n_routed_experts,
        "n_shared_experts": config.n_shared_experts,
        "n_group": config.n_group if limited else None,
        "topk_group": config.topk_group if limited else None,
        "norm_topk_prob": False,
        "routed_scaling_factor": config.routed_scaling_factor,
        "router_float32": True,
        "dense_layers": list(range(min(config.first_k_dense_replace, config.num_hidden_layers))),
    }


FAMILIES: dict[str, Callable[[Any], Settings]] = {
    "olmoe": _olmoe,
    "mixtral": _mixtral,
    "qwen2_moe": _qwen2,
    "qwen3_moe": _qwen3,
    "deepseek_v2": _deepseek_v2,
}
"""Model type -> the settings that are the family's own."""


def chain_config(name: str, source: PreTrainedConfig, iterations: int) -> CoeConfig:
    """Settings of the chain that begins as this MoE.

    Args:
        name: How to speak of the model.
        source: Its config.
        iterations: C, at least 1.

    Raises:
        ConfigError: Fewer than one iteration.
        UnsupportedModelError: A family, or a variant of one, that a chain does not repeat exactly.
        CheckpointError: Values that no model can have.
    """
    if iterations < 1:
        raise ConfigError(f"iterations must be at least 1, not {iterations}")
    try:
        settings = _settings(source)
        config = CoeConfig(**settings, num_iterations=iterations)
    except UnsupportedModelError as problem:
        raise UnsupportedModelError(
            f"cannot make a chain of {name} ({source.model_type}): {problem}"
        ) from None
    except (StrictDataclassError, ConfigError) as problem:
        reason = " ".join(str(problem).split())
        raise CheckpointError(f"{name}: a wrong value in its config.json: {reason}") from problem
    config.architectures = ["CoeForCausalLM"]
    return config


def check_unchanged(name: str, config: CoeConfig, source: PreTrainedConfig) -> None:
    """Refuses a chain whose first iteration is no longer the MoE that it was made of.

    Raises:
        UnsupportedModelError: Naming the setting that is another now.
    """
    expected = chain_config(name, source, config.num_iterations)
    for key in sorted({*_settings(source)} - {*_FREE}):
        now, then = getattr(config, key), getattr(expected, key)
        if now != then:
            raise UnsupportedModelError(
                f"{name} is no longer the {source.model_type} it was made of: {key} is {now!r}, "
                f"and was {then!r}"
            )


def _settings(source: PreTrainedConfig) -> Settings:
    family = FAMILIES.get(source.model_type)
    if family is None:
        raise UnsupportedModelError(_reason(source))
    if getattr(source, "quantization_config", None):
        raise UnsupportedModelError("its weights are quantized. Use the original checkpoint")
    _check_window(source)
    _check_rope(source)
    own = family(source)
    if len(own.get("dense_layers", ())) == source.num_hidden_layers:
        raise UnsupportedModelError("none of its layers routes")
    given = {key: getattr(source, key, None) for key in (*_FREE, "head_dim")}
    found = {key: value for key, value in given.items() if value is not None}
    return {**{key: getattr(source, key) for key in _COPIED}, **found, **_CHAIN, **own}


def _reason(source: PreTrainedConfig) -> str:
    counts = ("num_experts", "num_local_experts", "n_routed_experts")
    routed = any(getattr(source, key, None) for key in counts)
    reason = _REASONS.get(source.model_type, "its family is not known to be exact")
    if not routed and source.model_type not in _REASONS:
        reason = _DENSE
    return f"{reason}. Families that are converted: {', '.join(FAMILIES)}"


def _check_window(source: Any) -> None:
    """A window that reaches over all positions is none."""
    if source.model_type == "qwen2_moe" and "sliding_attention" not in source.layer_types:
        return
    window = getattr(source, "sliding_window", None)
    if window is not None and window < source.max_position_embeddings:
        raise UnsupportedModelError(
            f"its attention sees a sliding window of {window} tokens (sliding_window), a CoE's all"
        )


def _check_rope(source: Any) -> None:
    rope = source.rope_parameters or {}
    kind = rope.get("rope_type", "default")
    if any(isinstance(value, dict) for value in rope.values()):
        raise UnsupportedModelError("its layers rotate positions in several ways (rope_parameters)")
    if kind != "default" and kind not in ROPE_INIT_FUNCTIONS:
        raise UnsupportedModelError(f"its positions are rotated in an unknown way, {kind!r}")
