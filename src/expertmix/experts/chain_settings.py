"""What a chain of experts is made by, and which settings make none. Knows names; no tensor."""

from __future__ import annotations

from typing import Protocol

from expertmix.errors import ConfigError

GATINGS = ("independent", "shared", "fixed")
RESIDUALS = ("inner", "outer", "init", "inner+outer", "none")
NORMS = ("once", "per_iteration")
SHARED_EXPERTS = ("per_iteration", "once")
SCORES = ("softmax", "sigmoid")


class ChainSettings(Protocol):
    """What a chain is made by; `CoeConfig` is one, and its docstring explains every name."""

    hidden_size: int
    rms_norm_eps: float
    num_experts: int
    num_experts_per_tok: int
    num_iterations: int
    active_iterations: int | None
    gating: str
    residual: str
    norm: str
    shared_experts: str
    shared_expert_gate: bool
    iteration_scale: bool
    halting_threshold: float | None
    checkpoint_iterations: bool
    scores: str
    n_group: int | None
    topk_group: int | None
    router_bias: bool
    router_float32: bool
    weights_float32: bool
    norm_topk_prob: bool
    routed_scaling_factor: float


def check_chain(config: ChainSettings) -> None:
    """Refuse settings of which no chain can be made.

    Raises:
        ConfigError: Says which key, what is wrong with it, and what it may be.
    """
    for key, allowed in (
        ("gating", GATINGS),
        ("residual", RESIDUALS),
        ("norm", NORMS),
        ("shared_experts", SHARED_EXPERTS),
        ("scores", SCORES),
    ):
        value = getattr(config, key)
        if value not in allowed:
            raise ConfigError(f"{key}={value!r} is unknown: give one of {', '.join(allowed)}")
    _check_counts(config)
    _check_groups(config)
    if config.halting_threshold is not None and not config.halting_threshold >= 0:
        raise ConfigError(
            f"halting_threshold={config.halting_threshold} must not be negative: it is the size of "
            f"an update, relative to what it is added to, below which a token stops"
        )


def _check_counts(config: ChainSettings) -> None:
    for key in ("num_experts", "num_experts_per_tok", "num_iterations"):
        if getattr(config, key) < 1:
            raise ConfigError(f"{key}={getattr(config, key)} must be at least 1")
    if config.active_iterations is not None and config.active_iterations < 1:
        raise ConfigError(
            f"active_iterations={config.active_iterations} must be at least 1, or None"
        )
    if config.num_experts_per_tok > config.num_experts:
        raise ConfigError(
            f"num_experts_per_tok={config.num_experts_per_tok} is more than "
            f"num_experts={config.num_experts}: lower it"
        )


def _check_groups(config: ChainSettings) -> None:
    groups, chosen = config.n_group, config.topk_group
    if (groups is None) != (chosen is None):
        raise ConfigError(f"n_group={groups} and topk_group={chosen}: give both, or neither")
    if groups is None or chosen is None:
        return
    if groups < 1 or config.num_experts % groups:
        raise ConfigError(f"num_experts={config.num_experts} do not split into n_group={groups}")
    reach = chosen * config.num_experts // groups
    if not 1 <= chosen <= groups or reach < config.num_experts_per_tok:
        raise ConfigError(
            f"topk_group={chosen} of n_group={groups} leaves {reach} experts, of which "
            f"num_experts_per_tok={config.num_experts_per_tok} are to be chosen"
        )
