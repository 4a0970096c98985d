"""What a page is made of: `Section`, and the small parts that sections share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from expertmix.report import words
from expertmix.report.markup import Html, join, tag, text
from expertmix.report.palette import SEQUENTIAL, scale_color, share_scale, text_on
from expertmix.report.plots import Plot

_LONGEST = 48  # letters of a name; the whole one shows when pointed at


@dataclass(frozen=True)
class Section:
    """One section of the page.

    Attributes:
        key: Its anchor.
        title: Heading.
        reading: How to read the picture, for a person who has never seen one like it.
        body: The picture.
        headline: What the numbers show; names between back quotes. Empty where there is nothing.
        plots: Charts that stand in the body.
        summary: The headline is one of the page's main findings.
    """

    key: str
    title: str
    reading: str
    body: Html
    headline: str = ""
    plots: tuple[Plot, ...] = ()
    summary: bool = True


@dataclass(frozen=True)
class CellStyle:
    """A table cell with a background from a color scale.

    Attributes:
        shown: Text in the cell.
        color: Background, or None.
        strong: Stands out.
    """

    shown: str
    color: str | None = None
    strong: bool = False


def shade(shown: str, scale: Sequence[str], place: float, *, strong: bool = False) -> CellStyle:
    """A cell colored by its place in 0..1 of a scale."""
    return CellStyle(shown, scale_color(scale, place), strong)


def grid(
    caption: str,
    corner: str,
    columns: Sequence[str],
    rows: Sequence[tuple[str, Sequence[CellStyle]]],
    *,
    css: str = "grid",
) -> Html:
    """A table with row and column headings that scrolls sideways where it is too wide."""
    head = [_heading("col", name) for name in (corner, *columns)]
    body = [
        tag("tr", {}, _heading("row", name), *(_cell(cell) for cell in cells))
        for name, cells in rows
    ]
    table = tag(
        "table",
        {"class": css, "style": f"--columns:{len(columns)}"},
        tag("caption", {}, caption),
        tag("thead", {}, tag("tr", {}, *head)),
        tag("tbody", {}, *body),
    )
    return tag(
        "div", {"class": "scroll", "tabindex": "0", "role": "region", "aria-label": caption}, table
    )


def _heading(scope: str, name: str) -> Html:
    shown = Html(text(words.cut(name, _LONGEST)).replace("_", "_<wbr>"))  # where it may break
    return tag("th", {"scope": scope, "title": name}, shown)


def _cell(cell: CellStyle) -> Html:
    style = cell.color and f"background:{cell.color};color:{text_on(cell.color)}"
    shown = words.cut(cell.shown, _LONGEST)
    whole = cell.shown if shown != cell.shown else None
    strong = "strong" if cell.strong else None
    return tag("td", {"style": style, "class": strong, "title": whole}, shown)


def chart(plot: Plot, caption: str = "") -> Html:
    """The place of a chart, with its menu and its caption."""
    box = tag(
        "div",
        {
            "class": "plot",
            "id": plot.key,
            "role": "img",
            "aria-label": plot.title,
            "style": f"height:{plot.height}px",
        },
    )
    parts: list[str] = [
        tag("div", {"class": "controls"}, _menu(plot), _color_key(plot)),
        tag("div", {"class": "scroll wide" if plot.wide else "plain"}, box),
        tag("figcaption", {}, caption) if caption else Html(""),
    ]
    return tag("figure", {}, *parts)


def _menu(plot: Plot) -> Html:
    if len(plot.choices) < 2:
        return Html("")
    options = [
        tag("option", {"value": str(number)}, name) for number, name in enumerate(plot.choices)
    ]
    name = f"{plot.key}-choice"
    return tag(
        "span",
        {},
        tag("label", {"for": name}, f"{plot.choice_noun} "),
        tag("select", {"id": name, "data-plot": plot.key}, *options),
    )


def _color_key(plot: Plot) -> Html:
    if plot.color_key is None:
        return Html("")
    name, top = plot.color_key
    stops = ",".join(f"{color} {place:.0%}" for place, color in share_scale(SEQUENTIAL))
    return tag(
        "span",
        {"class": "key"},
        f"{name}: {words.percent(0)} ",
        tag("i", {"style": f"background:linear-gradient(to right,{stops})"}),
        f" {words.percent(top)}",
    )


def swatches(named: Sequence[tuple[str, str]]) -> Html:
    """Names with their colors; beside a chart, whose own legend would take a phone's width."""
    parts = [
        tag("span", {"class": "swatch"}, tag("i", {"style": f"background:{color}"}), name)
        for name, color in named
    ]
    return tag("p", {"class": "swatches"}, *parts)


def panels(noun: str, key: str, named: Sequence[tuple[str, Html]], *, lazy: bool = False) -> Html:
    """Several pictures of which one shows at a time, with a menu.

    Args:
        noun: What one chooses.
        key: Unique on the page.
        named: Name and picture of each.
        lazy: Charts are drawn when they are first shown: for many of them.
    """
    options = [tag("option", {"value": str(n)}, name) for n, (name, _) in enumerate(named)]
    menu = tag(
        "p",
        {"class": "controls"},
        tag("label", {"for": key}, f"{noun} "),
        tag("select", {"id": key, "data-panels": key}, *options),
    )
    waits = "" if lazy else None
    shown = [
        tag(
            "div",
            {"data-panel-of": key, "data-lazy": waits, "hidden": None if n == 0 else ""},
            body,
        )
        for n, (_, body) in enumerate(named)
    ]
    return join([menu, *shown])


def folded(summary: str, body: Html) -> Html:
    """Details that open on demand."""
    return tag("details", {}, tag("summary", {}, text(summary)), body)
