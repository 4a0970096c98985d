"""How many modules of a layer are looked at as one: `Layers`.

Adapters sit at every linear module, which makes hundreds of sites: too many columns for a map and
too many steps for a slider. Where the experts are the same everywhere, a page shows layers (their
modules summed) and, beside them, kinds of modules. It knows nothing of HTML.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from expertmix.attribute import modules
from expertmix.attribute.modules import is_modular, mean_weights, parts, same_experts, summary
from expertmix.attribute.tally import Transition, Usage
from expertmix.core.decision import Decision
from expertmix.core.site import Site, SiteInfo
from expertmix.core.trace import Chunk, TraceMeta


def are_adapters(meta: TraceMeta) -> bool:
    """Whether a trace is of adapters on a base, and of nothing else: it says how they combine."""
    return "combination" in meta.settings and same_experts(meta.sites)


EVERYWHERE = Site("all layers")
"""All sites together, as a place of its own."""


@dataclass(frozen=True)
class Layers:
    """The layers that a trace's sites are modules of.

    Attributes:
        sites: The sites of the trace.
    """

    sites: tuple[SiteInfo, ...]

    @classmethod
    def of(cls, meta: TraceMeta) -> Layers | None:
        """The layers; None where each site is a layer already, or experts differ between sites."""
        return cls(meta.sites) if is_modular(meta.sites) or are_adapters(meta) else None

    @property
    def infos(self) -> tuple[SiteInfo, ...]:
        """A site per layer."""
        return tuple(summary(name, infos) for name, infos in self._members.items())

    @property
    def shown(self) -> tuple[SiteInfo, ...]:
        """All layers together, then each."""
        return (summary(EVERYWHERE.name, self.sites), *self.infos)

    @property
    def _members(self) -> dict[str, list[SiteInfo]]:
        return parts(self.sites, lambda module: module.layer)

    def pooled(self, chunk: Chunk) -> Chunk:
        """A token's decision in a layer: the mean of its weights over the layer's modules."""
        found = {
            Site(name): mean_weights(chunk.decisions, [info.site for info in infos])
            for name, infos in self._members.items()
        }
        every = mean_weights(chunk.decisions, [info.site for info in self.sites])
        weights = {EVERYWHERE: every, **found}
        pooled = {site: _ranked(one) for site, one in weights.items() if one is not None}
        return replace(chunk, decisions=pooled)

    def usage(self, counted: Usage, moves: tuple[Transition, ...]) -> Usage:
        """Counts by layer, with transitions that were counted on pooled chunks."""
        return replace(modules.by(counted, lambda module: module.layer), transitions=moves)

    def kinds(self, counted: Usage) -> Usage:
        """Counts by kind of module."""
        return modules.by(counted, lambda module: module.kind)


def _ranked(weights_NE: Tensor) -> Decision:
    """All experts, the largest weight first; -1 in the place of those without."""
    best = weights_NE.sort(dim=1, descending=True, stable=True)
    indices = best.indices.masked_fill(best.values == 0, -1)
    return Decision(indices, best.values, weights_NE.shape[1])
