"""How the page of a trace is put together: `render`."""

from __future__ import annotations

from expertmix.report import words
from expertmix.report.frame import Frame
from expertmix.report.markup import Html, join, tag
from expertmix.report.report import Report
from expertmix.report.section import Section
from expertmix.report.sections import (
    about,
    chain,
    dead,
    effects,
    evenness,
    extra,
    flow,
    load,
    own,
    serves,
    tokens,
)

_LEAD = {
    "expert": "This model is made of experts. For every token it reads, a router picks a few of "
    "them to do the work. This page shows whom it picked.",
    "adapter": "This model is a base with a shelf of adapters on it. For every token it reads, in "
    "every module where adapters act, a router picks some of them to add their part. This page "
    "shows whom it picked.",
}


def render(report: Report) -> str:
    """The whole page."""
    return Frame(
        title=report.title,
        subtitle=_subtitle(report),
        lead=_LEAD[report.expert],
        intro=_intro(report),
        tiles=_tiles(report),
        sections=_sections(report),
        tokens=tokens.to_json(report),
    ).html()


def _sections(report: Report) -> list[Section]:
    found = [
        own.section(report),
        serves.section(report),
        tokens.section(report),
        load.section(report),
        effects.section(report),
        *extra.sections(report),
        evenness.section(report),
        flow.section(report),
        chain.section(report),
        dead.section(report),
        about.section(report),
    ]
    return [section for section in found if section is not None]


def _subtitle(report: Report) -> Html:
    date = report.meta.created.partition("T")[0]
    return join([tag("span", {"class": "model"}, report.meta.model), f" · recorded {date}"])


def _intro(report: Report) -> Html:
    """What was run, and what was done to it."""
    applied = about.interventions(report)
    ways = [tag("p", {"class": "intro"}, report.intro)] if report.intro else []
    if applied:
        items = [tag("li", {}, edit) for edit in applied]
        ways.append(
            tag(
                "div",
                {"class": "applied"},
                tag("p", {}, "The model did not run as it is. While recording, this was applied:"),
                tag("ul", {}, *items),
            )
        )
    return join(ways)


def _tiles(report: Report) -> list[tuple[str, str]]:
    """Key figures."""
    infos = [site.info for site in report.ran]
    per_module = " and module" if report.layers else ""
    dead_experts = sum(len(site.total.dead) for site in report.ran)
    return [
        (
            words.count(report.usage.tokens),
            f"tokens in {words.counted(report.usage.samples, 'sample')}",
        ),
        (str(len(infos)), f"routed {report.noun}" + ("s" if len(infos) != 1 else "")),
        (words.span([info.num_experts for info in infos]), f"{report.expert}s per {report.noun}"),
        (words.span([info.top_k for info in infos]), f"{report.expert}s per token{per_module}"),
        (words.count(dead_experts), f"{report.expert}s never called"),
        (words.count(len(report.meta.interventions)), "interventions"),
    ]
