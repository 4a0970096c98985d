"""How evenly work is shared, and how sure the router is: lines over the sites."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from expertmix.attribute.tally import SiteUsage
from expertmix.report import words
from expertmix.report.markup import Html, join
from expertmix.report.plots import Json, Plot, axis_title, base_layout, labels, ticks
from expertmix.report.report import Report
from expertmix.report.section import CellStyle, Section, chart, folded, grid

_FEWEST_POINTS = 3  # fewer sites are a table, not a line

Line = Callable[[SiteUsage], float]


def _split(site: SiteUsage) -> float:
    """Entropy of a token's weights over its maximum log K."""
    return site.total.entropy / math.log(site.info.top_k) if site.info.top_k > 1 else math.nan


def _doubt(site: SiteUsage) -> float:
    """Entropy of softmax(logits) over its maximum log E."""
    experts = site.info.num_experts
    return site.total.router_entropy / math.log(experts) if experts > 1 else math.nan


_LINES: dict[str, Line] = {
    "balance: how evenly the calls are spread over experts": lambda site: site.total.balance,
    "split: how evenly a token divides its weight among its experts": _split,
    "doubt: how evenly the router's scores are spread (entropy)": _doubt,
}
_SHORT = {name: name.partition(":")[0] for name in _LINES}
_STYLES = (
    ("#1b6ca8", "circle", "solid"),
    ("#c2571a", "square", "dash"),
    ("#5b5f97", "diamond", "dot"),
)


def section(report: Report) -> Section:
    """Balance and entropy per site, and the load of the busiest expert."""
    numbers = _numbers(report)
    plots: tuple[Plot, ...] = ()
    body = numbers
    if len(report.ran) >= _FEWEST_POINTS:
        plots = (_even_plot(report), _peak_plot(report))
        body = join([*(chart(plot) for plot in plots), folded("The same as numbers", numbers)])
    return Section(
        key="evenness",
        title="How evenly is the work shared, and how sure is the router?",
        headline=headline(report),
        reading=(
            f"Balance is 1 when all {report.expert}s get the same number of calls and 0 when one "
            "gets all. "
            f"Split is 1 when a token trusts its {report.expert}s alike and 0 when it trusts one "
            "alone. "
            f"Doubt, where the router's scores were recorded, is 1 when it cannot tell the "
            f"{report.expert}s "
            "apart and 0 when it is certain."
        ),
        body=body,
        plots=plots,
    )


def headline(report: Report) -> str:
    """The most and the least even site."""
    known = [site for site in report.ran if not math.isnan(site.total.balance)]
    if not known:
        return f"No {report.expert} was called at all."
    even = max(known, key=lambda site: site.total.balance)
    uneven = min(known, key=lambda site: site.total.balance)
    if words.decimal(even.total.balance) == words.decimal(uneven.total.balance):
        everywhere = f" at every {report.noun}" if len(known) > 1 else ""
        peak = max(site.total.peak for site in known)
        return (
            f"Balance is {words.decimal(even.total.balance)} of 1{everywhere}; the busiest "
            f"{report.expert} gets {words.decimal(peak, 1)} times the mean load."
        )
    return (
        f"Work is shared most evenly at {report.place(even.site)} (balance "
        f"{words.decimal(even.total.balance)} of 1) and least evenly at "
        f"{report.place(uneven.site)} ({words.decimal(uneven.total.balance)}), where the busiest "
        f"{report.expert} gets {words.decimal(uneven.total.peak, 1)} times the mean load."
    )


def _lines(report: Report) -> dict[str, list[float]]:
    """The lines that have any point."""
    found = {name: [line(site) for site in report.ran] for name, line in _LINES.items()}
    return {name: y for name, y in found.items() if not all(map(math.isnan, y))}


def _even_plot(report: Report) -> Plot:
    styles = dict(zip(_LINES, _STYLES, strict=True))
    traces = [
        _line(report, _SHORT[name], y, styles[name], "%{y:.2f}")
        for name, y in _lines(report).items()
    ]
    layout = _line_layout(report, 340)
    layout["yaxis"] |= {"range": [0, 1.04], "dtick": 0.25, "title": axis_title("0 to 1")}
    title = f"Line chart of balance and entropy by {report.noun}. {headline(report)}"
    return Plot("evenness-lines", title, traces, layout)


def _peak_plot(report: Report) -> Plot:
    y = [site.total.peak for site in report.ran]
    trace = _line(report, f"busiest {report.expert}", y, _STYLES[0], "%{y:.1f} times the mean load")
    layout = _line_layout(report, 260)
    layout["yaxis"] |= {"rangemode": "tozero", "title": axis_title("times the mean")}
    layout["showlegend"] = True
    title = (
        f"Line chart of the busiest {report.expert}'s load by {report.noun}, in multiples of "
        "the mean load"
    )
    return Plot("evenness-peak", title, [trace], layout)


def _line(
    report: Report, name: str, y: Sequence[float], style: tuple[str, str, str], hover: str
) -> Json:
    color, symbol, dash = style
    return {
        "type": "scatter", "mode": "lines+markers", "name": name,
        "x": labels(_places(report)), "y": words.rounded(y),
        "line": {"color": color, "width": 2, "dash": dash},
        "marker": {"symbol": symbol, "size": 6},
        "hovertemplate": f"{report.noun} %{{x}}: {name} {hover}<extra></extra>",
    }  # fmt: skip


def _line_layout(report: Report, height: int) -> Json:
    layout = base_layout(height)
    layout["xaxis"] |= {"title": axis_title(report.noun), **ticks(_places(report))}
    layout["legend"] = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}
    return layout


def _places(report: Report) -> list[str]:
    return [report.names[site.site] for site in report.ran]


def _numbers(report: Report) -> Html:
    lines = _lines(report)
    columns = [*(_SHORT[name] for name in lines), "busiest ÷ mean", "weight on one hub (Gini)"]
    rows = [
        (
            report.names[site.site],
            [
                *(CellStyle(words.decimal(y[number])) for y in lines.values()),
                CellStyle(words.decimal(site.total.peak, 1)),
                CellStyle(words.decimal(site.total.centralization)),
            ],
        )
        for number, site in enumerate(report.ran)
    ]
    return grid(f"Evenness by {report.noun}", report.noun, columns, rows)
