"""Numbers of a study as JSON-ready dicts: usage of experts, sites, versions, the machine.

JSON has no NaN: what could not be measured is null.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from expertmix.attribute import SiteUsage, Tally, Usage
from expertmix.core.site import SiteInfo

_PACKAGES = ("expertmix", "torch", "transformers", "peft", "pyarrow")


def number(value: float, digits: int = 4) -> float | None:
    """A rounded number, or None for NaN and infinities."""
    return round(value, digits) if math.isfinite(value) else None


def numbers(values: Iterable[float], digits: int = 4) -> list[float | None]:
    """Several of them."""
    return [number(value, digits) for value in values]


def named(values: dict[str, float]) -> dict[str, float | None]:
    """Numbers by name."""
    return {name: number(value) for name, value in values.items()}


def site_list(sites: Sequence[SiteInfo]) -> list[dict[str, Any]]:
    """Sites with their experts."""
    return [
        {
            "site": str(info.site),
            "experts": info.num_experts,
            "top_k": info.top_k,
            "names": list(info.experts),
        }
        for info in sites
    ]


def usage_figures(usage: Usage) -> list[dict[str, Any]]:
    """How often and with how much weight each expert was called, site by site."""
    return [_site(site) for site in usage if site.total.tokens]


def _site(site: SiteUsage) -> dict[str, Any]:
    return {
        "site": str(site.site),
        **_tally(site.total),
        "dead": list(site.total.dead),
        "balance": number(site.total.balance),
        "entropy": number(site.total.entropy),
        "by_label": {label: _tally(tally) for label, tally in site.by_label.items()},
    }


def _tally(tally: Tally) -> dict[str, Any]:
    return {"frequency": numbers(tally.frequency.tolist()), "mass": numbers(tally.mass.tolist())}


def versions() -> dict[str, str]:
    """Of the packages that decide what comes out."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """What it ran on, in words that name no machine."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return {
        "system": platform.system(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": str(accelerator) if accelerator else None,
    }
