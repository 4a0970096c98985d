"""How the page is put together: `render`, one offline HTML file.

The file holds its style, its script, plotly.js (once) and its data. A content security policy in
its head forbids the browser to fetch anything at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from string import Template

from expertmix.report import words
from expertmix.report.markup import Html, join, script_data, sentence, tag, text
from expertmix.report.report import Report
from expertmix.report.section import Section
from expertmix.report.sections import (
    about,
    dead,
    effects,
    evenness,
    extra,
    flow,
    load,
    serves,
    tokens,
)


def render(report: Report) -> str:
    """The whole page."""
    from plotly.offline import get_plotlyjs

    sections = _sections(report)
    template = Template(_asset("page.html"))
    return template.substitute(
        title=text(report.title),
        subtitle=_subtitle(report),
        intro=_intro(report),
        tiles=_tiles(report),
        summary=_summary(sections),
        contents=_contents(sections),
        sections=join(_section(section) for section in sections),
        style=_asset("page.css"),
        plotly=get_plotlyjs(),
        data=script_data(
            {
                "plots": {plot.key: plot.to_json() for one in sections for plot in one.plots},
                "tokens": tokens.to_json(report),
            }
        ),
        script=_asset("page.js"),
    )


def _sections(report: Report) -> list[Section]:
    found = [
        serves.section(report),
        tokens.section(report),
        load.section(report),
        effects.section(report),
        *extra.sections(report),
        evenness.section(report),
        flow.section(report),
        dead.section(report),
        about.section(report),
    ]
    return [section for section in found if section is not None]


def _section(section: Section) -> Html:
    title = f"{section.key}-title"
    parts = [
        tag("h2", {"id": title}, section.title),
        tag("p", {"class": "headline"}, sentence(section.headline)) if section.headline else "",
        tag("p", {"class": "reading"}, section.reading) if section.reading else "",
        section.body,
    ]
    return tag("section", {"id": section.key, "aria-labelledby": title}, *parts)


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


def _tiles(report: Report) -> Html:
    """Key figures."""
    infos = [site.info for site in report.ran]
    dead_experts = sum(len(site.total.dead) for site in report.ran)
    figures = [
        (
            words.count(report.usage.tokens),
            f"tokens in {words.counted(report.usage.samples, 'sample')}",
        ),
        (str(len(infos)), f"routed {report.noun}" + ("s" if len(infos) != 1 else "")),
        (words.span([info.num_experts for info in infos]), f"experts per {report.noun}"),
        (words.span([info.top_k for info in infos]), "experts per token"),
        (words.count(dead_experts), "experts never called"),
        (words.count(len(report.meta.interventions)), "interventions"),
    ]
    return join(
        tag("div", {"class": "tile"}, tag("dt", {}, name), tag("dd", {}, value))
        for value, name in figures
    )


def _summary(sections: Sequence[Section]) -> Html:
    found = [section for section in sections if section.summary and section.headline]
    return join(
        tag("li", {}, tag("a", {"href": f"#{section.key}"}, sentence(section.headline)))
        for section in found
    )


def _contents(sections: Sequence[Section]) -> Html:
    return join(
        tag("li", {}, tag("a", {"href": f"#{section.key}"}, section.title)) for section in sections
    )


def _asset(name: str) -> str:
    return files("expertmix.report").joinpath("assets", name).read_text(encoding="utf-8")
