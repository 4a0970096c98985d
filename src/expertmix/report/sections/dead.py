"""Which experts were never called."""

from __future__ import annotations

from expertmix.attribute.tally import SiteUsage
from expertmix.report import words
from expertmix.report.markup import Html, join, tag
from expertmix.report.report import Report
from expertmix.report.section import Section

_MOST_NAMES = 24

_ABSENT = " A layer in which an adapter has no module cannot call it."


def section(report: Report) -> Section:
    """A list per site, or the word that there are none."""
    dead = [site for site in report.ran if site.total.dead]
    body = tag("p", {"class": "none"}, f"None: every {report.expert} was called at least once.")
    return Section(
        key="dead",
        title=f"Were any {report.expert}s never called?",
        headline=headline(report),
        reading=(
            f"An {report.expert} that no token calls takes memory and does nothing for this text. "
            f"It may well serve text that was not run here: the more tokens, the more such a "
            f"finding means.{_ABSENT if report.layers else ''}"
        ),
        body=_list(report, dead) if dead else body,
    )


def headline(report: Report) -> str:
    """How many of all experts."""
    dead = sum(len(site.total.dead) for site in report.ran)
    every = sum(site.info.num_experts for site in report.ran)
    text = words.counted(report.usage.tokens, "token")
    nouns = f"{report.expert}s"
    if report.layers:
        nouns += ", layer by layer,"
    if not dead:
        return f"All {words.count(every)} {nouns} were called at least once in {text}."
    return (
        f"{words.count(dead)} of {words.count(every)} {nouns} were never called in {text} "
        f"({words.percent(dead / every)})."
    )


def _list(report: Report, sites: list[SiteUsage]) -> Html:
    items = [
        tag(
            "li",
            {},
            tag("strong", {}, report.place(site.site)),
            f": {words.listed(_names(report, site), _MOST_NAMES)} "
            f"({len(site.total.dead)} of {site.info.num_experts})",
        )
        for site in sites
    ]
    return tag("ul", {"class": "dead"}, join(items))


def _names(report: Report, site: SiteUsage) -> list[str]:
    names = report.group_of(site.site).experts
    return [names[number] for number in site.total.dead]
