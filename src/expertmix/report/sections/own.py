"""Does each text reach the expert of its own name? A confusion table, and accuracy by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from expertmix.core.site import Site
from expertmix.report import places, words
from expertmix.report.markup import Html, join
from expertmix.report.palette import SEQUENTIAL
from expertmix.report.plots import (
    MANY,
    Json,
    Plot,
    axis_title,
    base_layout,
    heat_map,
    labels,
    ticks,
)
from expertmix.report.report import Report
from expertmix.report.routing_check import RoutingCheck
from expertmix.report.section import CellStyle, Section, chart, folded, grid, shade

_WIDEST_TABLE = 16  # more experts are shown as a heat map without numbers
_FEWEST_POINTS = 3  # fewer layers are a table, not a line


def section(report: Report) -> Section | None:
    """The check; None where none was given."""
    check = report.routing
    if check is None:
        return None
    plots, bodies = _confusion(report, check)
    if len(check.layers) >= _FEWEST_POINTS:
        line = _line_chart(report, check)
        plots, bodies = [*plots, line], [*bodies, chart(line, _caption(report, check))]
    bodies += [folded("The same as numbers", _numbers(report, check))]
    return Section(
        key="own",
        title=f"Does each text reach its own {report.expert}?",
        headline=headline(report, check),
        reading=_reading(report, check),
        body=join(bodies),
        plots=tuple(plots),
    )


def headline(report: Report, check: RoutingCheck) -> str:
    """How often, and how often by chance."""
    return (
        f"{words.percent(check.tokens)} of tokens and {words.percent(check.texts)} of texts go to "
        f"the {report.expert} of their own name; by chance it would be "
        f"{words.even_share(len(check.experts))}."
    )


def _reading(report: Report, check: RoutingCheck) -> str:
    own = "where both have one name" if _as_map(check) else "that are outlined"
    return (
        f"The texts were read, not answered. Each row is a kind of text, each column an "
        f"{report.expert}; a cell is the share of the row's tokens for which that {report.expert} "
        f"had the largest weight, summed over all sites ({report.expert}s that tie share the "
        f"token). A router that knows the text fills the cells {own}; one that does not care "
        f"puts {words.even_share(len(check.experts))} everywhere."
    )


def _as_map(check: RoutingCheck) -> bool:
    return len(check.experts) > _WIDEST_TABLE


def _confusion(report: Report, check: RoutingCheck) -> tuple[list[Plot], list[Html]]:
    if _as_map(check):
        plot = _map(report, check)
        return [plot], [chart(plot)]
    rows = [(label, _cells(check, label)) for label in check.shares]
    return [], [grid(f"Text by {report.expert}", "text", check.experts, rows, css="grid own")]


def _cells(check: RoutingCheck, label: str) -> list[CellStyle]:
    return [
        shade(words.percent(share), SEQUENTIAL, share, strong=name == label)
        for name, share in zip(check.experts, check.shares[label], strict=True)
    ]


def _map(report: Report, check: RoutingCheck) -> Plot:
    values = [words.rounded(list(row)) for row in check.shares.values()]
    top = max((value for row in values for value in row if value), default=1.0)
    trace, layout = heat_map(
        values,
        columns=check.experts,
        rows=tuple(check.shares),
        column_title=report.expert,
        hover=f"%{{y}}, {report.expert} %{{x}}: %{{z:.1%}}",
        top=top,
    )
    title = f"Text by {report.expert}. {headline(report, check)}"
    wide, scale = len(check.experts) > MANY, ("share of tokens", top)
    return Plot("own-map", title, [trace], layout, color_key=scale, wide=wide)


def _caption(report: Report, check: RoutingCheck) -> str:
    best = max(check.layers, key=lambda name: check.layers[name])
    return (
        f"Share of tokens that went to the {report.expert} of their text, by layer; the dashed "
        f"line is chance. The best layer is {_short(check.layers)[best]}, with "
        f"{words.percent(check.layers[best])}."
    )


def _short(names: Mapping[str, float]) -> dict[str, str]:
    """Numbers of layers."""
    short = places.short_names([Site(name) for name in names])
    return {site.name: name for site, name in short.items()}


def _line_chart(report: Report, check: RoutingCheck) -> Plot:
    x = labels(list(_short(check.layers).values()))
    layout = base_layout(280)
    layout["xaxis"] |= {"title": axis_title("layer"), **ticks(x)}
    layout["yaxis"] |= {"range": [0, 1.04], "dtick": 0.25, "tickformat": ".0%"}
    layout["legend"] = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}
    traces = [
        _line(f"own {report.expert}", x, list(check.layers.values()), "#1b6ca8", "solid"),
        _line("chance", x, [check.chance] * len(x), "#717581", "dash"),
    ]
    return Plot("own-layers", f"Line chart. {_caption(report, check)}", traces, layout)


def _line(name: str, x: Sequence[str], y: Sequence[float], color: str, dash: str) -> Json:
    return {
        "type": "scatter", "mode": "lines+markers" if dash == "solid" else "lines", "name": name,
        "x": list(x), "y": words.rounded(y), "line": {"color": color, "width": 2, "dash": dash},
        "marker": {"size": 6}, "hovertemplate": f"layer %{{x}}: {name} %{{y:.0%}}<extra></extra>",
    }  # fmt: skip


def _numbers(report: Report, check: RoutingCheck) -> Html:
    rows = [("all sites", check.tokens), ("texts as a whole", check.texts)]
    rows += list(check.kinds.items()) if len(check.kinds) > 1 else []
    rows += [(f"layer {name}", check.layers[key]) for key, name in _short(check.layers).items()]
    cells = [(name, [CellStyle(words.percent(share))]) for name, share in rows]
    return grid(
        f"Share that went to the {report.expert} of its own name", "counted over", ["own"], cells
    )
