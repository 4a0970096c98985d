"""What is reported: `Report`, the numbers of one page, and the verbs that write it.

It holds counts and a few sample tokens, no longer the trace. How the page looks is `page`'s matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from expertmix.attribute.mass import UsageCounter
from expertmix.attribute.tally import SiteUsage, Usage
from expertmix.core.partial import PartialFile
from expertmix.core.site import Site, SiteInfo
from expertmix.core.trace import Trace, TraceMeta
from expertmix.errors import TraceError
from expertmix.report import places
from expertmix.report.effect import Effect
from expertmix.report.groups import Group, grouped
from expertmix.report.strips import Strip, StripCollector
from expertmix.report.table import Table

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

    @classmethod
    def of(
        cls,
        trace: Trace,
        *,
        title: str = "Who does the work?",
        intro: str = "",
        effects: Sequence[Effect] = (),
        tables: Sequence[Table] = (),
        strips: int = 12,
    ) -> Report:
        """Count a trace, in one pass, and keep what a page needs.

        Args:
            trace: In memory or in a file.
            title: Heading of the page.
            intro: A paragraph that says what was run.
            effects: Metrics with and without interventions.
            tables: Further tables, such as the loss of base, MoE and oracle expert.
            strips: Samples to show token by token, at most; 0 keeps all text off the page.

        Raises:
            TraceError: The trace has no sites, no tokens or no decisions.
        """
        counter = UsageCounter(trace.meta.sites, _flow_pairs(trace.meta.sites))
        collector = StripCollector(trace.meta.sites, strips)
        if trace.meta.sites:
            for chunk in trace.chunks():
                counter.add(chunk)
                collector.add(chunk)
        usage = counter.result()
        if not any(site.total.tokens for site in usage):
            raise TraceError("no site ran in this trace: it has tokens, but no decisions for them")
        return cls(
            title=title,
            intro=intro,
            meta=trace.meta,
            usage=usage,
            groups=grouped(usage.sites),
            strips=collector.result(),
            effects=tuple(effects),
            tables=tuple(tables),
            names=places.short_names(trace.sites),
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
    def labels(self) -> tuple[str, ...]:
        """Labels in order of appearance; of very many, those with most tokens."""
        tokens = self.usage.label_tokens
        largest = sorted(tokens, key=lambda label: -tokens[label])[:_MOST_LABELS]
        return tuple(label for label in self.usage.labels if label in largest)

    def place(self, site: Site) -> str:
        """A site in a sentence: `layer 7`."""
        return f"{self.noun} {self.names[site]}"

    def group_of(self, site: Site) -> Group:
        """The group of a site that ran."""
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
        target = Path(path)
        content = self.html().encode("utf-8", "replace")
        page = PartialFile(target)
        try:
            with page.writing():
                page.file.write(content)
            page.seal()
            page.publish()
        finally:
            page.discard()
        return target


def _flow_pairs(infos: Sequence[SiteInfo]) -> list[tuple[Site, Site]]:
    """Evenly spaced sites, two by two, and the first with the last."""
    sites = [info.site for info in infos]
    count = min(_FLOW_SITES, len(sites))
    chosen = [sites[round(step * (len(sites) - 1) / max(1, count - 1))] for step in range(count)]
    ends = [(chosen[0], chosen[-1])] if count > 2 else []
    return [*pairwise(chosen), *ends]
