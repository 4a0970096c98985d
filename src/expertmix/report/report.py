"""What is reported: `Report`, the numbers of one page, and the verbs that write it.

It holds counts and a few sample tokens, no longer the trace. How the page looks is `page`'s matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from expertmix.attribute.chain import ChainCounter, Chains
from expertmix.attribute.mass import UsageCounter
from expertmix.attribute.tally import SiteUsage, Usage
from expertmix.core.site import Site, SiteInfo
from expertmix.core.trace import Chunk, Trace, TraceMeta
from expertmix.errors import TraceError
from expertmix.report import places
from expertmix.report.effect import Effect
from expertmix.report.frame import write_page
from expertmix.report.groups import Group, grouped
from expertmix.report.layers import EVERYWHERE, Layers, are_adapters
from expertmix.report.routing_check import RoutingCheck
from expertmix.report.strips import Strip, StripCollector
from expertmix.report.table import Table

if TYPE_CHECKING:
    from expertmix.experts.chain_updates import LayerUpdates

_MOST_LABELS = 24
_FLOW_SITES = 5  # columns of the flow chart: more cannot be followed by eye


@dataclass(frozen=True, eq=False)
class Report:
    """One page about one trace.

    Example:
        >>> report = Report.of(trace, title="Eight experts", effects=[...], tables=[...])
        >>> report.save("report.html")

    Attributes:
        title: Heading of the page.
        intro: A paragraph under it, or nothing.
        meta: Origin of the trace.
        usage: What was counted.
        groups: Sites that can be looked at together; those that never ran are in none.
        strips: Tokens that are shown one by one.
        effects: What interventions did, as the caller measured it.
        tables: Further tables of the caller.
        names: Short names of the sites.
        layers: Where the trace's sites are modules of these layers, and the page shows layers.
        kinds: Then what was counted by kind of module.
        routing: Whether texts reach the expert of their own name, as the caller counted it.
        answers: The strips are answers, colored by who made each token.
        chains: Layers with several iterations; often none.
        updates: What their iterations gave, where it was measured.
    """

    title: str
    intro: str
    meta: TraceMeta
    usage: Usage
    groups: tuple[Group, ...]
    strips: tuple[Strip, ...]
    effects: tuple[Effect, ...]
    tables: tuple[Table, ...]
    names: dict[Site, str]
    layers: Layers | None = None
    kinds: Usage | None = None
    routing: RoutingCheck | None = None
    answers: bool = False
    chains: Chains | None = None
    updates: tuple[LayerUpdates, ...] = ()

    @classmethod
    def of(
        cls,
        trace: Trace,
        *,
        title: str = "Who does the work?",
        intro: str = "",
        effects: Sequence[Effect] = (),
        tables: Sequence[Table] = (),
        strips: int | Sequence[Strip] = 12,
        routing: RoutingCheck | None = None,
        updates: Sequence[LayerUpdates] = (),
    ) -> Report:
        """Count a trace, in one pass, and keep what a page needs.

        Args:
            trace: In memory or in a file.
            title: Heading of the page.
            intro: A paragraph that says what was run.
            effects: Metrics with and without interventions.
            tables: Further tables, such as the loss of base, MoE and oracle expert.
            strips: Samples to show token by token, at most; 0 keeps all text off the page. Or
                answers to show, each token with the decisions that made it.
            routing: Whether texts reach the expert of their own name.
            updates: What the iterations of chains gave, as `update_norms` measured it.

        Raises:
            TraceError: The trace has no sites, no tokens or no decisions.
        """
        reader = _Reader(trace.meta, strips if isinstance(strips, int) else 0)
        if trace.meta.sites:
            for chunk in trace.chunks():
                reader.add(chunk)
        counted = reader.sites.result()
        if not any(site.total.tokens for site in counted):
            raise TraceError("no site ran in this trace: it has tokens, but no decisions for them")
        layers, usage = reader.layers, reader.usage(counted)
        answers = not isinstance(strips, int)
        return cls(
            title=title,
            intro=intro,
            meta=trace.meta,
            usage=usage,
            groups=grouped(usage.sites, _noun(trace.meta)),
            strips=reader.collector.result() if isinstance(strips, int) else tuple(strips),
            effects=tuple(effects),
            tables=tuple(tables),
            names=places.short_names([site.site for site in usage]),
            layers=layers,
            kinds=None if layers is None else layers.kinds(counted),
            routing=routing,
            answers=answers,
            chains=reader.chains.result(counted) or None,
            updates=tuple(updates),
        )

    @property
    def ran(self) -> tuple[SiteUsage, ...]:
        """Sites with decisions, in the model's order."""
        return tuple(site for site in self.usage if site.total.tokens)

    @property
    def noun(self) -> str:
        """`layer`, or `site`."""
        return places.noun(self.names)

    @property
    def expert(self) -> str:
        """`expert`, or `adapter` where adapters of a base were routed."""
        return _noun(self.meta)

    @property
    def by_weight(self) -> bool:
        """Shares are of weight, not of calls: of many modules, one or other calls everybody."""
        return self.layers is not None

    @property
    def strip_sites(self) -> tuple[Site, ...]:
        """Places for which the strips have decisions."""
        sites = tuple(site.site for site in self.ran)
        return sites if self.layers is None else (EVERYWHERE, *sites)

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels in order of appearance; of very many, those with most tokens."""
        tokens = self.usage.label_tokens
        largest = sorted(tokens, key=lambda label: -tokens[label])[:_MOST_LABELS]
        return tuple(label for label in self.usage.labels if label in largest)

    def short(self, site: Site) -> str:
        """A site's name on an axis or a slider."""
        return "all" if site == EVERYWHERE else self.names[site]

    def place(self, site: Site) -> str:
        """A site in a sentence: `layer 7`."""
        if site == EVERYWHERE:
            return EVERYWHERE.name
        return f"{self.noun} {self.names[site]}"

    def group_of(self, site: Site) -> Group:
        """The group of a site that ran; with layers there is one."""
        if self.layers is not None:
            return self.groups[0]
        return next(group for group in self.groups if any(one.site == site for one in group.sites))

    def html(self) -> str:
        """The whole page, with everything that it needs inside."""
        from expertmix.report.page import render

        return render(self)

    def save(self, path: str | Path) -> Path:
        """Write the page under a temporary name, then give it its own.

        Raises:
            OutputError: The file cannot be written; nothing is left half-written.
        """
        return write_page(self.html(), path)


class _Reader:
    """Counts chunks as they pass by, and takes strips; layers where sites are modules of them."""

    def __init__(self, meta: TraceMeta, strips: int) -> None:
        infos = meta.sites
        self.layers = Layers.of(meta)
        shown = infos if self.layers is None else self.layers.infos
        pairs = _flow_pairs(shown)
        self.sites = UsageCounter(infos, pairs if self.layers is None else ())
        self.chains = ChainCounter(infos)
        self._moves = None if self.layers is None else UsageCounter(shown, pairs)
        self.collector = StripCollector(infos if self.layers is None else self.layers.shown, strips)

    def add(self, chunk: Chunk) -> None:
        self.sites.add(chunk)
        self.chains.add(chunk)
        shown = chunk if self.layers is None else self.layers.pooled(chunk)
        self.collector.add(shown)
        if self._moves is not None:
            self._moves.add(shown)

    def usage(self, counted: Usage) -> Usage:
        """By layer, where sites are modules."""
        if self.layers is None or self._moves is None:
            return counted
        return self.layers.usage(counted, self._moves.result().transitions)


def _noun(meta: TraceMeta) -> str:
    return "adapter" if are_adapters(meta) else "expert"


def _flow_pairs(infos: Sequence[SiteInfo]) -> list[tuple[Site, Site]]:
    """Evenly spaced sites, two by two, and the first with the last."""
    sites = [info.site for info in infos]
    count = min(_FLOW_SITES, len(sites))
    chosen = [sites[round(step * (len(sites) - 1) / max(1, count - 1))] for step in range(count)]
    ends = [(chosen[0], chosen[-1])] if count > 2 else []
    return [*pairwise(chosen), *ends]
