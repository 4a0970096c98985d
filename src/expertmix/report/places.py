"""What sites are called on a page: `layer 7` for `model.layers.7.mlp`.

Only the part in which the names differ is kept; the step is added where a site has several.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from expertmix.core.site import Site


def short_names(sites: Sequence[Site]) -> dict[Site, str]:
    """A short, unique name for each site: a layer's number where that is enough."""
    tails = _different_parts([site.name.split(".") for site in sites])
    steps = any(site.step for site in sites)
    names = {
        site: f"{tail}#{site.step}" if steps else tail
        for site, tail in zip(sites, tails, strict=True)
    }
    unique = len(set(names.values())) == len(names)
    return names if unique else {site: str(site) for site in sites}


def noun(names: Mapping[Site, str]) -> str:
    """What the sites are: `layer` where they are numbered, otherwise `site`."""
    numbered = all(name.partition("#")[0].isdigit() for name in names.values())
    return "layer" if numbered else "site"


def _different_parts(paths: list[list[str]]) -> list[str]:
    same_length = len({len(path) for path in paths}) == 1
    varying = [
        column for column in range(len(paths[0])) if len({path[column] for path in paths}) > 1
    ] if same_length else []  # fmt: skip
    if varying:
        return [".".join(path[column] for column in varying) for path in paths]
    if same_length:  # one module, at one or more steps
        return [_number(path) for path in paths]
    return [".".join(path) for path in paths]


def _number(path: list[str]) -> str:
    numbers = [part for part in path if part.isdigit()]
    return numbers[-1] if numbers else path[-1]
