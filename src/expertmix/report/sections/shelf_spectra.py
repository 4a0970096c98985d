"""How fast the strength of an adapter falls from its first direction to its last: lines."""

from __future__ import annotations

from expertmix.report import words
from expertmix.report.palette import expert_colors
from expertmix.report.plots import Json, Plot, axis_title, base_layout, labels
from expertmix.report.section import Section, chart
from expertmix.report.shelf_report import ShelfReport

_MOST_LINES = 16  # more cannot be followed by eye
_DASHES = ("solid", "dash", "dot")


def section(report: ShelfReport) -> Section | None:
    """A line per adapter; None where no adapter has two directions."""
    if report.profile.shape[1] < 2:
        return None
    plot = _plot(report)
    few = len(report.names) > _MOST_LINES
    return Section(
        key="spectra",
        title="How many directions does each adapter use?",
        headline=headline(report),
        reading=(
            "An adapter's change of a weight is a sum of directions, the strongest first. A line "
            "that falls at once is an adapter with one thing to say; a flat one uses all of its "
            "rank. A router that keeps only the first direction (Arrow) sees little of a flat one."
        ),
        body=chart(
            plot,
            "Singular value by that of the first direction, mean over the modules of an adapter."
            + (f" Shown are the {_MOST_LINES} largest adapters." if few else ""),
        ),
        plots=(plot,),
    )


def headline(report: ShelfReport) -> str:
    """The flattest and the steepest adapter."""
    means_E = report.ranks.mean_effective
    if bool(means_E.isnan().all()):
        return "No adapter does anything."
    flat, steep = int(means_E.nan_to_num(-1).argmax()), int(means_E.nan_to_num(1e9).argmin())
    highest = report.profile.shape[1]
    if flat == steep:
        return (
            f"{words.named(report.names[flat])} effectively uses "
            f"{words.decimal(float(means_E[flat]), 1)} of "
            f"{highest} directions."
        )
    return (
        f"Of up to {highest} directions, {words.named(report.names[flat])} effectively uses "
        f"{words.decimal(float(means_E[flat]), 1)} and {words.named(report.names[steep])} "
        f"{words.decimal(float(means_E[steep]), 1)}."
    )


def _plot(report: ShelfReport) -> Plot:
    most = min(_MOST_LINES, len(report.names))
    chosen = sorted(report.ranks.total_size.topk(most).indices.tolist())
    names = labels([report.names[number] for number in chosen])
    colors = expert_colors(len(chosen))
    traces = [
        _line(name, report.profile[number].tolist(), color, _DASHES[place % len(_DASHES)])
        for place, (name, number, color) in enumerate(zip(names, chosen, colors, strict=True))
    ]
    layout = base_layout(360)
    layout["xaxis"] |= {"title": axis_title("direction"), "dtick": _step(report.profile.shape[1])}
    layout["yaxis"] |= {"range": [0, 1.04], "dtick": 0.25, "title": axis_title("strength")}
    layout["legend"] = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}
    layout["showlegend"] = True
    return Plot("spectra-lines", f"Line chart of spectra. {headline(report)}", traces, layout)


def _line(name: str, values: list[float], color: str, dash: str) -> Json:
    kept = [value for value in values if value > 0]  # neither null directions nor nan
    return {
        "type": "scatter", "mode": "lines+markers", "name": name,
        "x": list(range(1, len(kept) + 1)), "y": words.rounded(kept),
        "line": {"color": color, "width": 2, "dash": dash}, "marker": {"size": 5},
        "hovertemplate": f"{name}, direction %{{x}}: %{{y:.2f}} of the first<extra></extra>",
    }  # fmt: skip


def _step(directions: int) -> int:
    return next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000) if directions / step <= 20)
