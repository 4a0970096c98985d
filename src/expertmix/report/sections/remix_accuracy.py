"""Right answers and change in loss with their intervals: two dot plots, a row per routing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from expertmix.core.estimate import Estimate
from expertmix.report import words
from expertmix.report.markup import join
from expertmix.report.palette import INK, PETROFF
from expertmix.report.plots import Json, Plot, axis_title, base_layout, label
from expertmix.report.remix_data import RemixLine
from expertmix.report.remix_report import RemixReport
from expertmix.report.section import Section, chart, swatches

COLORS = {
    "base": INK, "method": PETROFF[0], "rival": PETROFF[3], "control": "#8a6d00",
    "bound": PETROFF[8],
}  # fmt: skip
_SYMBOLS = {"base": "square", "method": "circle", "rival": "diamond", "control": "x",
            "bound": "triangle-up"}  # fmt: skip
_READING = (
    "A change in loss is of each pair, a routing and the base on the same item: a bar that leaves "
    "out the dotted line counts as shown."
)
_READING_CHOICE = (
    "A dot is what was measured, its bar where the true value lies with 95 % confidence; the "
    "dotted line is the base. Bars of right answers may overlap and the routings differ all the "
    "same, since all had the same items: what counts is the test in the table above."
)
_ROW = 30  # pixels
_LONGEST = 22  # letters of a name: more leave no room for the dots on a narrow screen


def section(report: RemixReport) -> Section:
    """A plot of right answers, where there is a choice, and one of the change in loss."""
    plots = [_change_plot(report)] if len(report.lines) > 1 else []
    if not report.free:
        plots.insert(0, _accuracy_plot(report))
    lines = [line for line in report.ordered if line.kind != "base" or not report.free]
    kinds = [(kind, COLORS[kind]) for kind in dict.fromkeys(line.kind for line in lines)]
    return Section(
        key="intervals",
        title="How sure is that?",
        reading=_READING if report.free else f"{_READING_CHOICE} {_READING}",
        body=join([swatches(kinds), *(chart(plot, _CAPTIONS[plot.key]) for plot in plots)]),
        plots=tuple(plots),
        summary=False,
    )


_CAPTIONS = {
    "accuracy-dots": "Right answers, with Wilson's interval. Hollow circle: dense, with all "
    "experts that were used while optimizing.",
    "loss-dots": "Change in loss against the base, in nats, with a paired bootstrap interval. Left "
    "of the line is better.",
}


def _accuracy_plot(report: RemixReport) -> Plot:
    lines = report.ordered
    traces = _traces(lines, lambda line: _scaled(line.accuracy), "%{x:.1f} % right")
    dense = [(row, line) for row, line in enumerate(lines) if _differs(line)]
    if dense:
        traces.append(_hollow(dense))
    layout = _layout(lines, "right answers in %", 100 * report.base.accuracy.value)
    title = "Dot plot of right answers: " + "; ".join(
        f"{line.method} {words.percent(line.accuracy.value)}" for line in lines
    )
    return Plot("accuracy-dots", title, traces, layout)


def _differs(line: RemixLine) -> bool:
    return not math.isnan(line.dense) and line.kind != "base" and line.changed > 0


def _scaled(found: Estimate) -> Estimate:
    return Estimate(100 * found.value, 100 * found.low, 100 * found.high)


def _hollow(dense: Sequence[tuple[int, RemixLine]]) -> Json:
    return {
        "type": "scatter", "mode": "markers", "name": "dense",
        "x": words.rounded([100 * line.dense for _, line in dense], 2),
        "y": [row for row, _ in dense],
        "text": [label(line.method, 60) for _, line in dense],
        "marker": {"size": 13, "symbol": "circle-open", "color": INK, "line": {"width": 1.2}},
        "hovertemplate": "%{text}, dense: %{x:.1f} % right<extra></extra>",
    }  # fmt: skip


def _change_plot(report: RemixReport) -> Plot:
    lines = [line for line in report.ordered if line.kind != "base"]
    traces = _traces(lines, lambda line: line.change, "%{x:+.3f} nats")
    title = "Dot plot of changes in loss: " + "; ".join(
        f"{line.method} {words.signed(line.change.value, 3)}" for line in lines
    )
    return Plot("loss-dots", title, traces, _layout(lines, "change in loss, in nats", 0.0))


def _traces(
    lines: Sequence[RemixLine], number: Callable[[RemixLine], Estimate], hover: str
) -> list[Json]:
    """A trace per kind, for the legend."""
    found = []
    for kind in dict.fromkeys(line.kind for line in lines):
        rows = [(row, line) for row, line in enumerate(lines) if line.kind == kind]
        values = [number(line) for _, line in rows]
        found.append(
            {
                "type": "scatter", "mode": "markers", "name": kind,
                "x": words.rounded([one.value for one in values], 5),
                "y": [row for row, _ in rows],
                "text": [label(line.method, 60) for _, line in rows],
                "error_x": {
                    "type": "data", "symmetric": False, "thickness": 1.6, "width": 4,
                    "array": words.rounded([one.high - one.value for one in values], 5),
                    "arrayminus": words.rounded([one.value - one.low for one in values], 5),
                },
                "marker": {"size": 9, "color": COLORS[kind], "symbol": _SYMBOLS[kind]},
                "hovertemplate": f"%{{text}}: {hover}<extra></extra>",
            }
        )  # fmt: skip
    return found


def _layout(lines: Sequence[RemixLine], title: str, base: float) -> Json:
    rows = list(range(len(lines)))
    layout = base_layout(_ROW * len(lines) + 60)
    layout["margin"] |= {"t": 8, "b": 44}
    layout["xaxis"] |= {"title": axis_title(title), "nticks": 7}
    layout["yaxis"] |= {
        "tickmode": "array", "tickvals": rows, "ticktext": [name(line) for line in lines],
        "range": [len(lines) - 0.5, -0.5],
    }  # fmt: skip
    layout["showlegend"] = False
    layout["shapes"] = [
        {
            "type": "line", "xref": "x", "yref": "paper", "x0": round(base, 5),
            "x1": round(base, 5), "y0": 0, "y1": 1, "layer": "below",
            "line": {"color": INK, "width": 1, "dash": "dot"},
        }
    ]  # fmt: skip
    return layout


def name(line: RemixLine) -> str:
    """On an axis: a control that stands below its method is named by what it does."""
    if line.of and line.method.startswith(f"{line.of}, "):
        return "↳ " + label(line.method.removeprefix(f"{line.of}, "), _LONGEST)
    return label(line.method, _LONGEST)
