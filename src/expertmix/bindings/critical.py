"""Which sites are critical: the last layers, all, a pattern, or a list.

Knows names and numbers of sites; no model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from expertmix.core.site import Site, SiteInfo, match
from expertmix.errors import ConfigError, UnknownSiteError

Layers = str | Sequence[int | str]


def critical_sites(infos: Sequence[SiteInfo], layers: Layers) -> tuple[SiteInfo, ...]:
    """The critical sites, in the order in which they run.

    Args:
        infos: All sites of a model.
        layers: `last N` (the last N layers that route, or all where there are fewer), `all`, a
            pattern of site names, or a sequence of layer numbers and patterns.

    Raises:
        UnknownSiteError: A pattern matches nothing, or a layer has no routed module.
        ConfigError: Nothing is named, or sites of unlike experts.
    """
    named = _named(tuple(infos), layers)
    found = tuple(info for info in infos if info.site in named)
    if not found:
        raise ConfigError(f"layers={layers!r} names no layer: give 'last 5', 'all' or some numbers")
    _refuse_unlike(found)
    return found


def layer_of(site: Site) -> int | None:
    """Number of the layer that a site lies in, or None where its name holds none."""
    found = re.search(r"\.(\d+)(\.|$)", site.name)
    return None if found is None else int(found[1])


def _named(infos: tuple[SiteInfo, ...], layers: Layers) -> set[Site]:
    sites = [info.site for info in infos]
    if not isinstance(layers, str):
        return {
            site
            for one in layers
            for site in (_of_layer(one, sites) if isinstance(one, int) else match(one, sites))
        }
    last = re.fullmatch(r"last (\d+)", layers.strip())
    if layers.strip() == "all":
        return set(sites)
    if last is None:
        return set(match(layers, sites))
    numbers = sorted({_number(site) for site in sites})[-int(last[1]) :] if int(last[1]) else []
    return {site for site in sites if _number(site) in numbers}


def _number(site: Site) -> int:
    number = layer_of(site)
    if number is None:
        raise ConfigError(
            f"{site} lies in no numbered layer: name the critical sites by a pattern, such as "
            f"{site.name!r}, or give layers='all'"
        )
    return number


def _of_layer(number: int, sites: Iterable[Site]) -> list[Site]:
    known = {site: layer_of(site) for site in sites}
    found = [site for site, layer in known.items() if layer == number]
    if not found:
        layers = sorted({layer for layer in known.values() if layer is not None})
        raise UnknownSiteError(
            f"layer {number} has no routed module (no MoE, no routed adapter). Layers that have: "
            f"{', '.join(map(str, layers)) or 'none with a number'}"
        )
    return found


def _refuse_unlike(infos: Sequence[SiteInfo]) -> None:
    """A pathway is one table of sites times experts."""
    first = infos[0]
    for info in infos:
        if (info.num_experts, info.top_k) != (first.num_experts, first.top_k):
            raise ConfigError(
                f"critical sites must have equally many experts and choose equally many: "
                f"{first.site} chooses {first.top_k} of {first.num_experts}, {info.site} "
                f"{info.top_k} of {info.num_experts}. Name fewer of them (layers='<pattern>')."
            )
