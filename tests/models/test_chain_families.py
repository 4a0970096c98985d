from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import (
    DeepseekV2Config,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from expertmix.errors import CheckpointError, ConfigError, UnsupportedModelError
from expertmix.models.chain_conversion import to_chain
from expertmix.models.chain_families import FAMILIES, chain_config
from expertmix.models.coe import CoeConfig

from .moe_families import MODELS, edit_config, make_moe


def refused(config: PreTrainedConfig) -> str:
    with pytest.raises(UnsupportedModelError) as caught:
        chain_config("it", config, 2)
    return str(caught.value)


def test_every_family_is_tried() -> None:
    """The tiny models of the tests cover the table."""
    assert {config.model_type for config, _ in MODELS.values()} == set(FAMILIES)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (LlamaConfig(), "it is dense. Make a MoE of it and LoRA adapters first"),
        (GptOssConfig(), "attention sinks"),
        (CoeConfig(), "a Chain-of-Experts already"),
    ],
)
def test_other_families_are_refused(config: PreTrainedConfig, says: str) -> None:
    """With the reason, and with those that are taken."""
    message = refused(config)
    assert says in message
    assert "olmoe, mixtral, qwen2_moe, qwen3_moe, deepseek_v2" in message


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (MixtralConfig(sliding_window=4096), "a sliding window of 4096 tokens"),
        (Qwen3MoeConfig(use_sliding_window=True), "a sliding window of 4096 tokens"),
        (
            Qwen2MoeConfig(use_sliding_window=True, max_window_layers=9),
            "a sliding window of 4096 tokens",
        ),
        (DeepseekV2Config(mlp_bias=True, num_experts_per_tok=2), "mlp_bias"),
        (
            DeepseekV2Config(topk_method="noaux_tc", num_experts_per_tok=2),
            "cannot choose experts by 'noaux_tc'",
        ),
        (Qwen3MoeConfig(num_hidden_layers=2, mlp_only_layers=[0, 1]), "none of its layers routes"),
        (OlmoeConfig(quantization_config={"quant_method": "fp8"}), "its weights are quantized"),
    ],
)
def test_variants_that_a_chain_lacks_are_refused(config: PreTrainedConfig, says: str) -> None:
    """By the key that makes the difference."""
    assert says in refused(config)


@pytest.mark.parametrize(
    ("rope", "says"),
    [
        ({"full_attention": {"rope_theta": 1.0}}, "in several ways"),
        ({"rope_type": "spiral", "rope_theta": 1.0}, "in an unknown way, 'spiral'"),
    ],
)
def test_unknown_positions_are_refused(rope: dict[str, Any], says: str) -> None:
    """A chain rotates all layers in one way."""
    config = MixtralConfig()
    config.rope_parameters = rope
    assert says in refused(config)


@pytest.mark.parametrize(
    "config",
    [
        MixtralConfig(sliding_window=4096, max_position_embeddings=4096),
        Qwen2MoeConfig(sliding_window=4096),
        Qwen2MoeConfig(use_sliding_window=True, max_window_layers=0),
        Qwen3MoeConfig(sliding_window=4096),
    ],
)
def test_a_window_that_is_not_in_use_is_none(config: PreTrainedConfig) -> None:
    """Switched off, on no layer, or as wide as all positions."""
    assert chain_config("it", config, 2).num_iterations == 2


@pytest.mark.parametrize("iterations", [0, -1])
def test_a_chain_has_an_iteration(iterations: int) -> None:
    """At least one."""
    with pytest.raises(ConfigError, match="iterations must be at least 1"):
        chain_config("it", MixtralConfig(), iterations)


def test_impossible_values_are_told(tmp_path: Path) -> None:
    """By their key."""
    moe = make_moe(tmp_path / "moe", "mixtral")
    edit_config(moe, num_experts_per_tok=9)
    with pytest.raises(CheckpointError, match="num_experts_per_tok=9 is more than num_experts=5"):
        to_chain(moe)
    edit_config(moe, num_experts_per_tok=None)
    with pytest.raises(CheckpointError, match="num_experts_per_tok"):
        to_chain(moe)
