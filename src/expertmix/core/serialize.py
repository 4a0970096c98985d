"""Interventions read back from JSON; an unknown kind or key is an error that names it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from expertmix.core.intervention import InOrder, Intervention
from expertmix.core.removal import Ablate, Mask
from expertmix.core.replay import Replay
from expertmix.core.reweight import Reweight
from expertmix.core.trace import Trace
from expertmix.errors import ConfigError

_ADDRESS = frozenset({"positions", "samples", "mask"})
_KEYS: dict[str, frozenset[str]] = {
    "ablate": _ADDRESS | {"sites", "experts"},
    "mask": _ADDRESS | {"sites", "experts"},
    "reweight": _ADDRESS | {"sites", "values", "stage", "mode", "experts"},
    "replay": _ADDRESS | {"trace", "sites", "missing", "any_model"},
    "in_order": frozenset({"interventions"}),
}


def from_json(text: str) -> Intervention:
    """Read what `Intervention.to_json` wrote.

    Raises:
        ConfigError: Not JSON, an unknown kind, or a wrong or missing key.
    """
    try:
        data = json.loads(text)
    except json.JSONDecodeError as problem:
        raise ConfigError(f"an intervention must be JSON: {problem}") from problem
    return from_dict(data)


def from_dict(data: Mapping[str, Any]) -> Intervention:
    """Read what `Intervention.to_dict` made.

    Raises:
        ConfigError: An unknown kind, or a wrong or missing key.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"an intervention must be an object with a kind, not {data!r}")
    fields = dict(data)
    kind = fields.pop("kind", None)
    if kind not in _KEYS:
        raise ConfigError(f"unknown intervention kind {kind!r}; known: {', '.join(_KEYS)}")
    unknown = sorted(set(fields) - _KEYS[kind])
    if unknown:
        raise ConfigError(
            f"{kind} has no key {unknown[0]!r}; known: {', '.join(sorted(_KEYS[kind]))}"
        )
    try:
        return _build(kind, fields)
    except (TypeError, KeyError, ValueError) as problem:
        raise ConfigError(f"{kind}: {problem}") from problem


def _build(kind: str, fields: dict[str, Any]) -> Intervention:
    if kind == "ablate":
        return Ablate(**fields)
    if kind == "mask":
        return Mask(**fields)
    if kind == "reweight":
        values = torch.tensor(fields.pop("values"), dtype=torch.float64)  # loses no bit of any type
        return Reweight(values=values, **fields)
    if kind == "replay":
        return Replay(trace=Trace.load(fields.pop("trace")), **fields)
    return InOrder(*(from_dict(part) for part in fields["interventions"]))
