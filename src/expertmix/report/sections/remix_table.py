"""The whole comparison in one table: methods, each with its controls, and bounds."""

from __future__ import annotations

from expertmix.report import remix_words, words
from expertmix.report.markup import Html, join, tag
from expertmix.report.palette import DIVERGING
from expertmix.report.remix_data import RemixLine
from expertmix.report.remix_report import RemixReport
from expertmix.report.section import CellStyle, Section, folded, grid, shade

_CHOICE = (
    "kind", "right [95 %]", "dense", "change in loss [95 %]", "gained", "lost", "p", "p (Holm)",
    "of oracle", "ms", "cost",
)  # fmt: skip
_FREE = ("kind", "loss", "change in loss [95 %]", "changed", "ms", "cost")
_READING = (
    "Every routing answered the same items. Gained: wrong under the base and right here; lost: the "
    "other way round. p is McNemar's exact test of those against the base, and Holm's correction "
    "counts the methods; below 0.05 a difference counts as shown. Under each method stand its "
    "controls: what they gain too, the method does not owe to similar items."
)
_READING_FREE = (
    "These texts have one answer each, so nothing is chosen and there is no accuracy: what counts "
    "is the loss of that answer, in nats; lower is better. An interval that leaves out zero counts "
    "as shown; it is not corrected for the number of methods. Under each method stand its controls."
)
_COLUMNS = (
    "right: share of right items with Wilson's interval. dense: the share with all experts that "
    "were used while optimizing; the hard result, right, is what the router could do. change in "
    "loss: of the choice among the options, in nats, with a paired bootstrap interval, which is "
    "not corrected for the number of methods. of oracle: share of the oracle's gain in right "
    "answers. ms: per item, the base's own pass included. cost: that over the base's own pass."
)


def section(report: RemixReport) -> Section:
    """Headline, table, and what stands behind them."""
    columns = _FREE if report.free else _CHOICE
    cells = _free_cells if report.free else _choice_cells
    rows = [(line.method, cells(line)) for line in report.ordered]
    table = grid("All routings on the same items", "routing", columns, rows, css="grid loose tight")
    notes = "" if report.free else tag("p", {"class": "reading"}, _COLUMNS)
    return Section(
        key="comparison",
        title="Does re-mixing help?",
        headline=remix_words.headline(report.lines),
        reading=_READING_FREE if report.free else _READING,
        body=join([table, notes, _said(report), _steering(report)]),
    )


def _choice_cells(line: RemixLine) -> list[CellStyle]:
    base = line.kind == "base"
    dash = CellStyle(words.DASH)
    compared = (
        [dash] * 6
        if base
        else [
            _change(line),
            CellStyle(words.count(line.gained)),
            CellStyle(words.count(line.lost)),
            CellStyle(remix_words.p_value(line.p)),
            CellStyle(remix_words.p_value(line.p_holm), strong=line.helps or line.harms),
            CellStyle(remix_words.share(line.gap, 0)),
        ]
    )
    return [
        CellStyle(line.kind),
        CellStyle(remix_words.share_interval(line.accuracy), strong=line.helps),
        dash if base else CellStyle(remix_words.share(line.dense)),
        *compared,
        *_cost(line),
    ]


def _free_cells(line: RemixLine) -> list[CellStyle]:
    base = line.kind == "base"
    dash = CellStyle(words.DASH)
    return [
        CellStyle(line.kind),
        CellStyle(words.decimal(line.loss, 3)),
        dash if base else _change(line),
        dash if base else CellStyle(words.count(line.changed)),
        *_cost(line),
    ]


def _change(line: RemixLine) -> CellStyle:
    """Colored where its interval leaves out zero."""
    shown = remix_words.change_interval(line.change)
    if not line.change.clear:
        return CellStyle(shown)
    return shade(shown, DIVERGING, 0.3 if line.change.value < 0 else 0.7)


def _cost(line: RemixLine) -> list[CellStyle]:
    return [
        CellStyle(words.decimal(line.milliseconds, 1)),
        CellStyle(remix_words.times(line.relative)),
    ]


def _said(report: RemixReport) -> Html:
    if not report.said:
        return Html("")
    found = tag("ul", {"class": "findings"}, *(tag("li", {}, one) for one in report.said))
    return folded("Each comparison in words", found)


def _steering(report: RemixReport) -> Html:
    """Why a gain of the oracle is no proof."""
    if report.free or not any(line.method == "wrong_oracle" for line in report.lines):
        return Html("")
    return join(
        [
            tag("h3", {}, "Misrouted, or only steerable?"),
            tag("p", {"class": "reading"}, remix_words.STEERING),
            *(tag("p", {}, one) for one in _oracles(report)),
        ]
    )


def _oracles(report: RemixReport) -> list[str]:
    lines = {line.method: line for line in report.lines}
    wrong = lines["wrong_oracle"]
    right = round(report.base.accuracy.value * report.base.items)
    found = [
        f"Here the wrong-label oracle makes {wrong.lost} of {words.counted(right, 'right answer')} "
        f"fall ({remix_words.p_said(wrong.p)})."
    ]
    if "oracle" in lines:
        oracle = lines["oracle"]
        found.insert(
            0,
            f"Here the oracle gains {oracle.gained} of "
            f"{words.counted(report.base.items - right, 'wrong answer')} and loses {oracle.lost}.",
        )
    return [" ".join(found)]
