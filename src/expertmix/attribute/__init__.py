"""Who is called: frequency and mass of experts, counted from a trace.

Three columns will stand side by side here, and are never mixed up: frequency and mass (`usage`),
routing sensitivity, and the task effect of running again without an expert. Nothing is imported
before it is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from expertmix.attribute.mass import UsageCounter, usage
    from expertmix.attribute.tally import SiteUsage, Tally, Transition, Usage, pool

_HOME = {
    "usage": "mass",
    "UsageCounter": "mass",
    "Usage": "tally",
    "SiteUsage": "tally",
    "Tally": "tally",
    "Transition": "tally",
    "pool": "tally",
}

__all__ = ["SiteUsage", "Tally", "Transition", "Usage", "UsageCounter", "pool", "usage"]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
