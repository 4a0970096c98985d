"""What all pages share: `Frame`, one offline HTML file of sections, and the verb that writes it.

The file holds its style, its script, plotly.js (once) and its data. A content security policy in
its head forbids the browser to fetch anything at all. Knows nothing of what the sections say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template

from expertmix.core.partial import write_whole
from expertmix.report.markup import Html, join, script_data, sentence, tag, text
from expertmix.report.section import Section


@dataclass(frozen=True)
class Frame:
    """A page, ready to be written down.

    Attributes:
        title: Heading.
        subtitle: What it is about, and when that was.
        lead: What a reader who knows nothing must know first.
        intro: What was done, or nothing.
        tiles: Key figures: (value, what it is).
        sections: In order.
        tokens: Data of token strips, or None.
    """

    title: str
    subtitle: str
    lead: str
    intro: str
    tiles: Sequence[tuple[str, str]]
    sections: Sequence[Section]
    tokens: object = None

    def html(self) -> str:
        """The whole page, with everything that it needs inside."""
        from plotly.offline import get_plotlyjs

        plots = {plot.key: plot.to_json() for one in self.sections for plot in one.plots}
        return Template(_asset("page.html")).substitute(
            title=text(self.title),
            subtitle=text(self.subtitle),
            lead=text(self.lead),
            intro=text(self.intro),
            tiles=join(_tile(value, name) for value, name in self.tiles),
            summary=_summary(self.sections),
            contents=_contents(self.sections),
            sections=join(_section(section) for section in self.sections),
            style=_asset("page.css"),
            plotly=get_plotlyjs(),
            data=script_data({"plots": plots, "tokens": self.tokens}),
            script=_asset("page.js"),
        )


def write_page(html: str, path: str | Path) -> Path:
    """Write a page under a temporary name, then give it its own.

    Raises:
        OutputError: The file cannot be written; nothing is left half-written.
    """
    target = Path(path)
    write_whole(target, html.encode("utf-8", "replace"))
    return target


def _tile(value: str, name: str) -> Html:
    return tag("div", {"class": "tile"}, tag("dt", {}, name), tag("dd", {}, value))


def _section(section: Section) -> Html:
    title = f"{section.key}-title"
    parts = [
        tag("h2", {"id": title}, section.title),
        tag("p", {"class": "headline"}, sentence(section.headline)) if section.headline else "",
        tag("p", {"class": "reading"}, section.reading) if section.reading else "",
        section.body,
    ]
    return tag("section", {"id": section.key, "aria-labelledby": title}, *parts)


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
