"""How much each expert is used, layer by layer: heat maps of experts by sites."""

from __future__ import annotations

from torch import Tensor

from expertmix.report import words
from expertmix.report.groups import Group, group_title
from expertmix.report.markup import Html, join, tag
from expertmix.report.plots import Plot, heat_map
from expertmix.report.report import Report
from expertmix.report.section import CellStyle, Section, chart, folded, grid

_MOST_CELLS = 4000  # larger maps have no table of numbers under them


def section(report: Report) -> Section | None:
    """One heat map per group, with a menu for the labels; a single site is shown by `serves`."""
    if len(report.ran) < 2:
        return None
    plots = tuple(_plot(report, group, number) for number, group in enumerate(report.groups))
    bodies = [
        join([_title(report, group), chart(plot, _caption(report, group)), _numbers(report, group)])
        for group, plot in zip(report.groups, plots, strict=True)
    ]
    return Section(
        key="load",
        title=f"How busy is each expert, {report.noun} by {report.noun}?",
        headline=headline(report),
        reading=(
            f"Each column is a {report.noun} of the model, each row an expert. The darker a cell, "
            f"the more tokens called that expert there. A dark row is an expert that is used "
            f"throughout; a pale column is a {report.noun} that shares its work evenly."
        ),
        body=join(bodies),
        plots=plots,
        summary=False,
    )


def headline(report: Report) -> str:
    """The busiest expert anywhere, and how far it is above its fair share."""
    frequency, group, site, expert = max(
        (
            (float(site.total.frequency.max()), group, site, int(site.total.frequency.argmax()))
            for group in report.groups
            for site in group.sites
        ),
        key=lambda one: one[0],
    )
    times = words.decimal(frequency / group.fair_share, 1)
    return (
        f"The busiest expert is {group.expert(expert)} at {report.place(site.site)}: "
        f"{words.percent(frequency)} of tokens call it, {times} times its fair share."
    )


def _caption(report: Report, group: Group) -> str:
    return (
        f"Share of tokens that called the expert. A {report.noun} that shared its work evenly "
        f"would show {words.percent(group.fair_share)} everywhere: each token calls "
        f"{group.sites[0].info.top_k} of {len(group.experts)} experts."
    )


def _title(report: Report, group: Group) -> Html:
    return tag("h3", {}, group_title(group)) if len(report.groups) > 1 else Html("")


def _frequency(group: Group, label: str | None) -> list[Tensor]:
    return [site.tally(label).frequency for site in group.sites]


def _map(group: Group, label: str | None) -> list[list[float | None]]:
    """Experts by sites."""
    columns = [words.rounded(frequency.tolist()) for frequency in _frequency(group, label)]
    return [list(row) for row in zip(*columns, strict=True)]


def _plot(report: Report, group: Group, number: int) -> Plot:
    whole = words.all_text(report.labels)
    labels: dict[str, str | None] = {whole: None} | {label: label for label in report.labels}
    choices = {name: _map(group, label) for name, label in labels.items()}
    top = max((v for z in choices.values() for row in z for v in row if v), default=1.0)
    trace, layout = heat_map(
        choices[whole],
        columns=[report.names[site.site] for site in group.sites],
        rows=group.experts,
        column_title=report.noun,
        hover=f"{report.noun} %{{x}}, expert %{{y}}: called by %{{z:.1%}} of tokens",
        top=top,
    )
    title = f"Heat map of experts by {report.noun}s. {headline(report)}"
    key = ("share of tokens", top)
    return Plot(f"load-{number}", title, [trace], layout, choices, "Text", key)


def _numbers(report: Report, group: Group) -> Html:
    if len(group.sites) * len(group.experts) > _MOST_CELLS:
        return Html("")
    columns = [report.names[site.site] for site in group.sites]
    rows = [
        (name, [CellStyle(words.percent(value or 0.0)) for value in row])
        for name, row in zip(group.experts, _map(group, None), strict=True)
    ]
    table = grid(
        f"Share of tokens that called each expert, by {report.noun}", "expert", columns, rows
    )
    return folded("The same as numbers", table)
