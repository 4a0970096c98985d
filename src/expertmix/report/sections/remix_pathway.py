"""How routing of the critical layers moved: heat maps of before, after and the difference."""

from __future__ import annotations

from expertmix.report import words
from expertmix.report.markup import Html, join, tag
from expertmix.report.palette import DIVERGING
from expertmix.report.plots import MANY, Json, Plot, heat_map
from expertmix.report.remix_data import RemixLine
from expertmix.report.remix_moves import Moved, Rows
from expertmix.report.remix_report import RemixReport
from expertmix.report.section import CellStyle, Section, chart, grid, panels

_MOST = 16  # routings in the menu
_SHORT, _LONGEST = 4, 24  # letters of a name below a column: level, and cut
_LEAST_TOP = 1e-3  # a map of differences that are all smaller stays pale


def section(report: RemixReport) -> Section | None:
    """A panel per routing; None where none was changed."""
    found = [(line, Moved.of(report.by_method[line.method], len(report.experts)))
             for line in report.ordered]  # fmt: skip
    moved = [(line, one) for line, one in found if one is not None][:_MOST]
    if not moved:
        return None
    plots = [_plots(report, one, number) for number, (_, one) in enumerate(moved)]
    shown = [
        (line.method, _panel(report, line, one, mine))
        for (line, one), mine in zip(moved, plots, strict=True)
    ]
    body = panels("Routing", "pathway-method", shown) if len(shown) > 1 else shown[0][1]
    return Section(
        key="pathway",
        title="How did the routing move?",
        headline=headline(report, *moved[0]),
        reading=(
            "Mean weights of the experts at the end of the prompt, where routing was re-mixed, "
            "over the items whose routing was changed. A column that changes its color for all "
            "items alike is one shift for everybody; moves that differ from item to item cancel "
            "out here, and show in the divergence instead."
        ),
        body=body,
        plots=tuple(plot for mine in plots for plot in mine),
        summary=False,
    )


def headline(report: RemixReport, line: RemixLine, moved: Moved) -> str:
    """Where it moved most."""
    site = max(range(len(moved.kl)), key=lambda number: moved.kl[number])
    return (
        f"{words.named(line.method)} moves most at {words.named(report.sites[site])}: a divergence "
        f"of {words.decimal(moved.kl[site], 3)} nats, and "
        f"{words.decimal(moved.exchanged[site], 1)} experts exchanged per decision."
    )


def _panel(
    report: RemixReport, line: RemixLine, moved: Moved, plots: tuple[Plot, Plot, Plot]
) -> Html:
    before, after, change = plots
    top = words.decimal(float(change.data[0]["zmax"]), 3)
    caption = (
        f"After minus before: brown experts gained weight, blue ones lost it; the darkest stand "
        f"for {top}."
    )
    pair = tag(
        "div",
        {"class": "pair" if len(report.experts) <= MANY else None},
        tag("div", {}, tag("h3", {}, "Before"), chart(before)),
        tag("div", {}, tag("h3", {}, "After"), chart(after)),
    )
    counted = tag(
        "p", {"class": "reading"},
        f"{words.counted(moved.moves, 'changed routing')}. The number of experts that a token "
        f"calls is the same before and after.{shifted(report, line)}",
    )  # fmt: skip
    return join(
        [counted, pair, tag("h3", {}, "Difference"), chart(change, caption), _table(report, moved)]
    )


def shifted(report: RemixReport, line: RemixLine) -> str:
    """What is not exact in how a routing moved, as a sentence behind another; or nothing."""
    if not line.shifts:
        return ""
    return (
        f" This routing shifts what the routers give: after is exact at {report.sites[0]}; behind "
        f"it the routers read something else than before, which is not counted here."
    )


def _table(report: RemixReport, moved: Moved) -> Html:
    rows = [
        (
            site,
            [
                CellStyle(words.decimal(moved.entropy_before[number], 3)),
                CellStyle(words.decimal(moved.entropy_after[number], 3)),
                CellStyle(words.decimal(moved.kl[number], 4)),
                CellStyle(words.decimal(moved.exchanged[number], 2)),
            ],
        )
        for number, site in enumerate(report.sites)
    ]
    columns = ("entropy before", "entropy after", "divergence", "exchanged")
    note = (
        "Entropy of the weights of the called experts, in nats: the higher, the more evenly they "
        "share. Divergence: Kullback-Leibler, in nats, of the new distribution over all experts "
        "from the base's. Exchanged: called experts that the base had not called."
    )
    return join(
        [
            tag("h3", {}, "By layer"),
            grid("How far routing moved, by layer", "layer", columns, rows, css="grid"),
            tag("p", {"class": "reading"}, note),
        ]
    )


def _plots(report: RemixReport, moved: Moved, number: int) -> tuple[Plot, Plot, Plot]:
    top = max([value for rows in (moved.before, moved.after) for row in rows for value in row])
    before, after = (
        _weights(report, rows, f"pathway-{key}-{number}", key, top or 1.0)
        for key, rows in (("before", moved.before), ("after", moved.after))
    )
    return before, after, _difference(report, moved.difference, number)


def _weights(report: RemixReport, rows: Rows, key: str, when: str, top: float) -> Plot:
    trace, layout = _map(report, rows, "mean weight %{z:.3f}", top)
    return Plot(
        key, f"Heat map of layers by experts: mean weight {when}", [trace], layout,
        color_key=("mean weight", top), wide=len(report.experts) > MANY,
    )  # fmt: skip


def _difference(report: RemixReport, rows: Rows, number: int) -> Plot:
    top = max(_LEAST_TOP, *(abs(value) for row in rows for value in row))
    trace, layout = _map(report, rows, "%{z:+.3f}", top)
    stops = [[place / (len(DIVERGING) - 1), color] for place, color in enumerate(DIVERGING)]
    trace |= {"zmin": -top, "colorscale": stops}
    title = "Heat map of layers by experts: mean weight after minus before"
    return Plot(f"pathway-change-{number}", title, [trace], layout, wide=len(report.experts) > MANY)


def _map(report: RemixReport, rows: Rows, hover: str, top: float) -> tuple[Json, Json]:
    trace, layout = heat_map(
        [words.rounded(row) for row in rows],
        columns=report.experts,
        rows=report.sites,
        column_title="expert",
        hover=f"%{{y}}, expert %{{x}}: {hover}",
        top=top,
    )
    longest = max(map(len, report.experts))
    if longest > _SHORT:  # slanted names stand where the title would, and few rows are low
        layout["height"] += 7 * min(longest, _LONGEST) - 20
        del layout["xaxis"]["title"]
    return trace, layout
