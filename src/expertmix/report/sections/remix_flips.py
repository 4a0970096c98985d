"""Who flipped: items whose answer changed from wrong to right or back, by routing."""

from __future__ import annotations

from expertmix.report import words
from expertmix.report.markup import Html, join, tag
from expertmix.report.palette import DIVERGING
from expertmix.report.remix_data import RemixItem
from expertmix.report.remix_report import RemixReport
from expertmix.report.section import CellStyle, Section, folded, grid, shade

_MOST = 20  # rows that are not folded
_READING = (
    "A row is an item that a method flipped. Blue: wrong under the base and right here. Brown: "
    "right under the base and wrong here. Controls and bounds stand beside, so one sees whether "
    "they flip the same items."
)
_SHADES = {"gained": 0.25, "lost": 0.75}


def section(report: RemixReport) -> Section | None:
    """A table of items by routings; None where nothing is chosen, or nothing but the base ran."""
    if report.free or not report.studied:
        return None
    rows = flipped(report)
    return Section(
        key="flips",
        title="Whose answers flipped?",
        headline=headline(report),
        reading=_READING if rows else "",
        body=_body(report, rows),
        summary=False,
    )


def flipped(report: RemixReport) -> list[int]:
    """Numbers of the items that a method flipped, those that most of them flipped first."""
    counts: dict[int, int] = {}
    for line in report.studied:
        for one in report.by_method[line.method]:
            if one.flip:
                counts[one.item] = counts.get(one.item, 0) + 1
    return sorted(counts, key=lambda item: (-counts[item], item))


def headline(report: RemixReport) -> str:
    """Counts of the first method, from its items."""
    line = report.studied[0]
    own = report.by_method[line.method]
    gained, lost = (sum(one.flip == way for one in own) for way in ("gained", "lost"))
    if not gained and not lost:
        return f"{words.named(line.method)} flips no answer."
    return (
        f"{words.named(line.method)} turns {words.counted(gained, 'wrong answer')} right and "
        f"{words.counted(lost, 'right answer')} wrong, of {words.counted(len(own), 'item')}."
    )


def _body(report: RemixReport, rows: list[int]) -> Html:
    if not rows:
        return tag("p", {"class": "none"}, "No method flipped any answer.")
    lines = [line for line in report.ordered if line.kind != "base"]
    found = {line.method: {one.item: one for one in report.by_method[line.method]}
             for line in lines}  # fmt: skip
    names = {one.item: one.name for one in report.items}
    shown = [
        (names[item], [_cell(found[line.method].get(item)) for line in lines]) for item in rows
    ]
    columns = [line.method for line in lines]
    caption = "Items whose answer a method flipped, by routing"
    first = grid(caption, "item", columns, shown[:_MOST])
    if len(rows) <= _MOST:
        return first
    rest = grid(f"{caption}, the others", "item", columns, shown[_MOST:])
    return join([first, folded(words.counted(len(rows) - _MOST, "more item"), rest)])


def _cell(one: RemixItem | None) -> CellStyle:
    if one is None:
        return CellStyle(words.DASH)
    if not one.flip:
        return CellStyle("")
    return shade(one.flip, DIVERGING, _SHADES[one.flip])
