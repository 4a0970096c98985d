"""Which of PEFT's LoRA configs mean exactly `W + scale * B @ A`, and with which scale.

Everything else is refused, never ignored. Knows PEFT's config keys, and no files or models.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from expertmix.errors import CheckpointError

_REFUSED = {
    "use_dora": "DoRA rescales the whole weight",
    "lora_bias": "its LoRA layers have a bias",
    "modules_to_save": "it replaces whole modules",
    "trainable_token_indices": "it retrains token embeddings",
    "target_parameters": "it adapts bare parameters, not modules",
    "layer_replication": "it duplicates layers of the base",
    "alora_invocation_tokens": "it acts only after an invocation text (aLoRA)",
    "use_qalora": "QALoRA pools the input",
    "use_bdlora": "its factors are block-diagonal (BD-LoRA)",
    "arrow_config": "it is a router over other adapters (Arrow)",
    "kasa_config": "KaSA changes the base weights",
    "velora_config": "VeLoRA is not understood",
    "monteclora_config": "MonteCLoRA is not understood",
}
_PLAIN = frozenset(
    (
        "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config",
        "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out",
        "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform",
        "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_config",
        "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern",
        "revision", "runtime_config", "target_modules", "task_type", "use_rslora",
    )
)  # fmt: skip
"""What PEFT 0.21 writes that changes nothing beyond `W + scale * B @ A`."""
_OTHER_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initializations that move part of the base weight into the adapter, or quantize the base."""


def refuse_unless_plain(config: Mapping[str, Any], name: str) -> None:
    """Let plain LoRA pass.

    Args:
        config: PEFT's config as a dict.
        name: Of the adapter, for the message.

    Raises:
        CheckpointError: The adapter does more; the message says what, and to which modules.
    """
    kind = config.get("peft_type")
    if str(kind).rpartition(".")[2] != "LORA":
        raise CheckpointError(f"adapter {name!r} is {kind}, not LORA")
    for key, reason in _REFUSED.items():
        if config.get(key):
            raise CheckpointError(
                f"adapter {name!r} is not a plain LoRA: {reason} ({key}={config[key]!r}), at "
                f"modules {_targets(config)}"
            )
    for key in config.keys() - _PLAIN - _REFUSED.keys():
        if config[key]:
            raise CheckpointError(
                f"adapter {name!r} has a setting that is not understood here "
                f"({key}={config[key]!r}): it may be more than a plain LoRA. If it is not, remove "
                f"that key from its config"
            )
    if config.get("bias", "none") != "none":
        raise CheckpointError(
            f"adapter {name!r} also trained biases (bias={config['bias']!r}), at modules "
            f"{_targets(config)}"
        )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_OTHER_BASE):
        raise CheckpointError(
            f"adapter {name!r} was started with {start!r}, which changes the base weights; let "
            f"PEFT convert it to a plain LoRA (path_initial_model_for_weight_conversion)"
        )


def scale_of(config: Mapping[str, Any], name: str, module: str, rank: int) -> float:
    """alpha / rank, or alpha / sqrt(rank) for rsLoRA; patterns win.

    Raises:
        CheckpointError: The config speaks of another rank than the weights have, has no alpha, or
            a pattern that is none.
    """
    expected = _by_pattern(config, "rank_pattern", "r", name, module)
    if rank < 1 or expected != rank:
        raise CheckpointError(
            f"adapter {name!r}, module {module!r}: its config says rank {expected!r}, its weights "
            f"have rank {rank}"
        )
    alpha = _by_pattern(config, "alpha_pattern", "lora_alpha", name, module)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise CheckpointError(
            f"adapter {name!r}, module {module!r}: its config has no finite lora_alpha: {alpha!r}"
        )
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(
    config: Mapping[str, Any], patterns: str, default: str, name: str, module: str
) -> Any:
    # The same rule as peft.utils.other.get_pattern_key: the first that matches a tail of the name.
    try:
        for key, value in (config.get(patterns) or {}).items():
            if re.match(rf"(.*\.)?({key})$", module):
                return value
    except (AttributeError, re.error) as problem:
        raise CheckpointError(
            f"adapter {name!r}: {patterns} in its config is no mapping of patterns: {problem}"
        ) from problem
    return config.get(default)


def _targets(config: Mapping[str, Any]) -> str:
    targets = config.get("target_modules") or ()
    if not isinstance(targets, list | tuple | set):
        return str(targets)
    return ", ".join(sorted(str(target) for target in targets)) or "(none named)"
