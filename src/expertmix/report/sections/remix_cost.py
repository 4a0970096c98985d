"""What it cost: milliseconds per item, by stage where that is known, beside the base's."""

from __future__ import annotations

from collections.abc import Sequence

from expertmix.report import remix_words, words
from expertmix.report.markup import Html, join
from expertmix.report.palette import PETROFF
from expertmix.report.plots import Json, Plot, axis_title, base_layout, label
from expertmix.report.remix_data import RemixLine
from expertmix.report.remix_report import RemixReport
from expertmix.report.section import CellStyle, Section, chart, grid, swatches
from expertmix.report.sections.remix_accuracy import name

STAGES = ("read", "neighbors", "states", "solve", "evaluate")
OTHER = "not told apart"
_COLORS = dict(zip((*STAGES, OTHER), (PETROFF[9], *PETROFF[1:3], PETROFF[0], PETROFF[3], "#d5d1c7"),
                   strict=True))  # fmt: skip
_ROW = 30


def section(report: RemixReport) -> Section | None:
    """A stacked bar per routing and a table; None where no time was taken."""
    if not report.base.milliseconds > 0:
        return None
    plot = _plot(report)
    shown = [(str(bar["name"]), str(bar["marker"]["color"])) for bar in plot.data]
    return Section(
        key="cost",
        title="What does it cost?",
        headline=headline(report),
        reading=(
            "Read: the base's own pass over prompt and options, which every routing needs. "
            "Neighbors: finding similar items. States: fetching what is kept of them. Solve: "
            "optimizing the pathway. Evaluate: scoring the options with the new one, or behind "
            "examples. What a method learns once is spread over the items. Cost is relative to "
            "reading. An item is read once, and that time is counted for every routing."
        ),
        body=join([swatches(shown), chart(plot), _table(report)]),
        plots=(plot,),
        summary=False,
    )


def headline(report: RemixReport) -> str:
    """The first method's price."""
    if not report.studied:
        return f"The base takes {words.decimal(report.base.milliseconds, 1)} ms per item."
    line = report.studied[0]
    return (
        f"{words.named(line.method)} takes {words.decimal(line.milliseconds, 1)} ms per item, "
        f"{words.decimal(line.relative, 2)} times the base's own pass over the same items."
    )


def stages(line: RemixLine) -> dict[str, float]:
    """Milliseconds by stage; what is in none of them is told as such."""
    found = {stage: line.stages[stage] for stage in STAGES if line.stages.get(stage)}
    rest = line.milliseconds - sum(found.values())
    return {**found, **({OTHER: rest} if rest > 0.005 * line.milliseconds else {})}


def _plot(report: RemixReport) -> Plot:
    lines = report.ordered
    split = [stages(line) for line in lines]
    every = [key for key in (*STAGES, OTHER) if any(key in one for one in split)]
    traces: list[Json] = [
        {
            "type": "bar", "orientation": "h", "name": stage,
            "y": list(range(len(lines))),
            "x": words.rounded([one.get(stage, 0.0) for one in split], 3),
            "text": [label(line.method, 60) for line in lines], "textposition": "none",
            "marker": {"color": _COLORS[stage]},
            "hovertemplate": f"%{{text}}, {stage}: %{{x:.1f}} ms<extra></extra>",
        }
        for stage in every
    ]  # fmt: skip
    height = _ROW * len(lines)
    layout = base_layout(height + 60)
    layout |= {"barmode": "stack", "bargap": 0.35, "showlegend": False}
    layout["margin"] |= {"t": 8, "b": 44}
    layout["xaxis"] |= {"title": axis_title("milliseconds per item"), "nticks": 7}
    layout["yaxis"] |= {
        "tickmode": "array", "tickvals": list(range(len(lines))),
        "ticktext": [name(line) for line in lines], "range": [len(lines) - 0.5, -0.5],
    }  # fmt: skip
    title = "Bars of milliseconds per item: " + "; ".join(
        f"{line.method} {words.decimal(line.milliseconds, 1)}" for line in lines
    )
    return Plot("cost-bars", title, traces, layout)


def _table(report: RemixReport) -> Html:
    split = {line.method: stages(line) for line in report.ordered}
    every = [key for key in (*STAGES, OTHER) if any(key in one for one in split.values())]
    rows = [(line.method, _cells(line, split[line.method], every)) for line in report.ordered]
    return grid(
        "Milliseconds per item by stage", "routing", (*every, "all", "cost"), rows,
        css="grid loose tight",
    )  # fmt: skip


def _cells(line: RemixLine, split: dict[str, float], every: Sequence[str]) -> list[CellStyle]:
    found = [
        CellStyle(words.decimal(split[key], 1) if key in split else words.DASH) for key in every
    ]
    total = CellStyle(words.decimal(line.milliseconds, 1), strong=True)
    return [*found, total, CellStyle(remix_words.times(line.relative))]
