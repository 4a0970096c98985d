"""Sites that are modules of a layer, looked at by layer or by kind: `split`, `by`, `winners`.

Adapters act at many modules of one layer (q_proj, up_proj …), each a site of its own. What was
counted there can be summed where the experts are the same everywhere; what was decided there can be
added up token by token. Knows no model: it reads names.

Legend: N tokens, E experts, S sites.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expertmix.attribute.tally import SiteUsage, Usage, pool
from expertmix.core.decision import Decision
from expertmix.core.site import Site, SiteInfo

_TIE = 1e-5  # of the largest: weights that differ by less are rounded sums of equal ones


@dataclass(frozen=True, slots=True)
class Module:
    """A site's name in two parts.

    Attributes:
        layer: Up to the layer's number: `model.layers.7`; the whole name where there is no number.
        kind: What comes after it: `mlp.up_proj`; the whole name where there is no number.
    """

    layer: str
    kind: str


def split(site: Site) -> Module:
    """Layer and kind of a site: the layer ends at the first number of its name."""
    path = site.name.split(".")
    ends = [place for place, part in enumerate(path, 1) if part.isdigit()]
    if not ends or ends[0] == len(path):
        return Module(site.name, site.name)
    return Module(".".join(path[: ends[0]]), ".".join(path[ends[0] :]))


def same_experts(infos: Sequence[SiteInfo]) -> bool:
    """Whether expert i means the same at every site: the experts have names, and the same ones."""
    return bool(infos) and bool(infos[0].experts) and len({info.experts for info in infos}) == 1


def is_modular(infos: Sequence[SiteInfo]) -> bool:
    """Whether sites are modules of layers with the same experts, so that layers can be pooled."""
    layers = {split(info.site).layer for info in infos}
    steps = any(info.site.step for info in infos)
    return same_experts(infos) and not steps and len(layers) < len(infos)


def parts(infos: Iterable[SiteInfo], of: Callable[[Module], str]) -> dict[str, list[SiteInfo]]:
    """Sites by layer or by kind, in order of first appearance."""
    found: dict[str, list[SiteInfo]] = {}
    for info in infos:
        found.setdefault(of(split(info.site)), []).append(info)
    return found


def by(usage: Usage, of: Callable[[Module], str]) -> Usage:
    """Counts summed over modules; a token counts once for each module that it passed.

    Args:
        usage: Of sites for which `same_experts` holds.
        of: Layer or kind.

    Returns:
        A site for each layer or kind, named so, without transitions.
    """
    groups = parts([site.info for site in usage], of)
    known = {site.site: site for site in usage}
    pooled = tuple(
        _pooled(name, [known[info.site] for info in infos]) for name, infos in groups.items()
    )
    return Usage(pooled, usage.labels, usage.label_tokens, (), usage.tokens, usage.samples)


def _pooled(name: str, sites: Sequence[SiteUsage]) -> SiteUsage:
    together = torch.stack([site.coactivation for site in sites]).sum(0)
    labels = {label: pool(tuple(sites), label) for label in sites[0].by_label}
    return SiteUsage(
        summary(name, [site.info for site in sites]), pool(tuple(sites)), labels, together
    )


def summary(name: str, infos: Sequence[SiteInfo]) -> SiteInfo:
    """One site in the place of several."""
    widest = max(info.top_k for info in infos)
    return SiteInfo(Site(name), infos[0].num_experts, widest, infos[0].experts)


def mean_weights(decisions: Mapping[Site, Decision], sites: Iterable[Site]) -> Tensor | None:
    """(N, E) weights, averaged over those of the sites that ran; None where none did."""
    found = [decisions[site] for site in sites if site in decisions]
    if not found:
        return None
    total_NE = found[0].dense()
    for one in found[1:]:  # one by one: hundreds of sites by a thousand adapters are gigabytes
        total_NE = total_NE + one.dense()
    return total_NE / len(found)


def winners(weights: Tensor) -> Tensor:
    """Whose weight is the largest, as shares of one: those that tie divide it.

    Args:
        weights: (..., E), not negative.

    Returns:
        (..., E) in the same type; all zero where no weight is above zero.
    """
    most = weights.amax(-1, keepdim=True)
    best = (weights >= most * (1 - _TIE)) & (most > 0)
    return best.to(weights.dtype) / best.sum(-1, keepdim=True).clamp(min=1)
