"""What the structural binding cannot see: families that do not fit, and why.

Every other MoE of transformers needs no entry here. docs/models.md lists who was tested.
"""

from __future__ import annotations

TESTED: tuple[str, ...] = (
    "afmoe",
    "aria_text",
    "axk1",
    "axk2",
    "bailing_hybrid",
    "beam",
    "coe",
    "cohere2_moe",
    "dbrx",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "deepseek_v4",
    "dots1",
    "dots3_note_text",
    "ernie4_5_moe",
    "exaone_moe",
    "flex_olmo",
    "flint",
    "gemma4",
    "gemma4_text",
    "glm4_moe",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "gpt_oss",
    "granitemoe",
    "granitemoe_swa",
    "granitemoehybrid",
    "granitemoeshared",
    "hunyuan_v1_moe",
    "hy_v3",
    "hy_v4",
    "inkling2_text",
    "inkling_text",
    "jamba",
    "kimi_linear",
    "kolibri1",
    "laguna",
    "lara_mini",
    "lfm2_moe",
    "longcat_flash",
    "mellum",
    "mimo_v2_flash",
    "minimax",
    "minimax_m2",
    "minimax_m3_vl_text",
    "mixtral",
    "nemotron_h",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3_5_moe",
    "qwen3_5_moe_text",
    "qwen3_moe",
    "qwen3_next",
    "qwen4_exp",
    "qwen4_exp_text",
    "solar_open",
    "zaya",
)
"""Causal-LM types of transformers 5.24 for which the laws of test_families.py hold; and `coe`, our
own chains of experts, whose laws are those of test_chain.py."""

UNSUPPORTED: dict[str, str] = {
    "Llama4TextExperts": "scores multiply the input of every expert; no weights reach them",
    "JetMoeParallelExperts": "tokens are sorted by expert before the experts see them",
    "SwitchTransformersExperts": "experts get a one-hot capacity mask instead of expert numbers",
    "NllbMoeExperts": "experts get a capacity mask instead of expert numbers",
    "DogeCDMoE": "experts are rows of two embeddings, picked by product keys",
}
"""Experts class -> reason; a model of such a family raises UnsupportedModelError."""

NO_PROBABILITIES = frozenset({"PhimoeTopKRouter"})
"""Routers whose softmax is taken again for each of the K experts, so that no one table exists."""

BY_TOKEN_ID = frozenset({"DeepseekV4HashRouter"})
"""Routers that look the experts up by token id: scores do not choose."""
