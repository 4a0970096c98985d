"""How much each expert is used, layer by layer: heat maps of experts by sites."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from expertmix.attribute.tally import SiteUsage, Tally
from expertmix.report import words
from expertmix.report.groups import Group, group_title
from expertmix.report.markup import Html, join, tag
from expertmix.report.plots import Plot, heat_map
from expertmix.report.report import Report
from expertmix.report.section import CellStyle, Section, chart, folded, grid

_MOST_CELLS = 4000  # larger maps have no table of numbers under them

Row = list[float | None]


def section(report: Report) -> Section | None:
    """One heat map per group, with a menu for the labels; a single site is shown by `serves`."""
    if len(report.ran) < 2:
        return None
    plots = tuple(_plot(report, group, number) for number, group in enumerate(report.groups))
    bodies = [
        join([_title(report, group), chart(plot, _caption(report, group)), _numbers(report, group)])
        for group, plot in zip(report.groups, plots, strict=True)
    ]
    kinds = _kinds(report)
    bodies += [chart(plot, "The same by kind of module, over all layers.") for plot in kinds]
    return Section(
        key="load",
        title=f"How busy is each {report.expert}, {report.noun} by {report.noun}?",
        headline=headline(report),
        reading=(
            f"Each column is a {report.noun} of the model, each row an {report.expert}. The darker "
            f"a cell, {_MEANING[report.by_weight]} that {report.expert} there. A dark row is an "
            f"{report.expert} that is used throughout; a pale column is a {report.noun} that "
            f"shares its work evenly."
        ),
        body=join(bodies),
        plots=(*plots, *kinds),
        summary=False,
    )


_MEANING = {False: "the more tokens called", True: "the larger the share of weight that went to"}


def headline(report: Report) -> str:
    """The busiest expert anywhere, and how far it is above its fair share."""
    share, group, site, expert = max(
        (
            (float(shares.max()), group, site, int(shares.argmax()))
            for group in report.groups
            for site in group.sites
            for shares in [_shares(report, site.total)]
        ),
        key=lambda one: one[0],
    )
    times = words.decimal(share / _fair(report, group), 1)
    did = "it gets {} of the weight" if report.by_weight else "{} of tokens call it"
    return (
        f"The busiest {report.expert} is {group.expert(expert)} at {report.place(site.site)}: "
        f"{did.format(words.percent(share))}, {times} times its fair share."
    )


def _shares(report: Report, tally: Tally) -> Tensor:
    """Calls, or weight where several modules of a layer are looked at as one."""
    return tally.normalized_mass.nan_to_num(0) if report.by_weight else tally.frequency


def _fair(report: Report, group: Group) -> float:
    return 1 / len(group.experts) if report.by_weight else group.fair_share


def _caption(report: Report, group: Group) -> str:
    fair = words.percent(_fair(report, group))
    if report.by_weight:
        fair = words.even_share(len(group.experts))
        return (
            f"Share of the routing weight, over the modules of a {report.noun}. Even shares would "
            f"be {fair} everywhere."
        )
    return (
        f"Share of tokens that called the {report.expert}. A {report.noun} that shared its work "
        f"evenly would show {fair} everywhere: each token calls {group.sites[0].info.top_k} of "
        f"{len(group.experts)} {report.expert}s."
    )


def _title(report: Report, group: Group) -> Html:
    return tag("h3", {}, group_title(group)) if len(report.groups) > 1 else Html("")


def _map(report: Report, sites: Sequence[SiteUsage], label: str | None) -> list[Row]:
    """Experts by sites."""
    columns = [words.rounded(_shares(report, site.tally(label)).tolist()) for site in sites]
    return [list(row) for row in zip(*columns, strict=True)]


def _plot(report: Report, group: Group, number: int) -> Plot:
    names = [report.names[site.site] for site in group.sites]
    return _drawn(report, group, group.sites, names, report.noun, f"load-{number}")


def _kinds(report: Report) -> tuple[Plot, ...]:
    """By kind of module, where sites are modules."""
    if report.kinds is None or len(report.kinds.sites) < 2:
        return ()
    ran = [site for site in report.kinds if site.total.tokens]
    names = [site.site.name.rpartition(".")[2] for site in ran]
    if len(set(names)) < len(names):
        names = [site.site.name for site in ran]
    return (_drawn(report, report.groups[0], ran, names, "kind of module", "load-kinds"),)


def _drawn(
    report: Report,
    group: Group,
    sites: Sequence[SiteUsage],
    names: Sequence[str],
    noun: str,
    key: str,
) -> Plot:
    whole = words.all_text(report.labels)
    labels: dict[str, str | None] = {whole: None} | {label: label for label in report.labels}
    choices = {name: _map(report, sites, label) for name, label in labels.items()}
    top = max((v for z in choices.values() for row in z for v in row if v), default=1.0)
    trace, layout = heat_map(
        choices[whole],
        columns=names,
        rows=group.experts,
        column_title=noun,
        hover=f"{noun} %{{x}}, {report.expert} %{{y}}: %{{z:.1%}} of {_unit(report)}",
        top=top,
    )
    title = f"Heat map of {report.expert}s by {noun}. {headline(report)}"
    return Plot(key, title, [trace], layout, choices, "Text", (f"share of {_unit(report)}", top))


def _unit(report: Report) -> str:
    return "weight" if report.by_weight else "tokens"


def _numbers(report: Report, group: Group) -> Html:
    if len(group.sites) * len(group.experts) > _MOST_CELLS:
        return Html("")
    columns = [report.names[site.site] for site in group.sites]
    rows = [
        (name, [CellStyle(words.percent(value or 0.0)) for value in row])
        for name, row in zip(group.experts, _map(report, group.sites, None), strict=True)
    ]
    title = f"Share of {_unit(report)} of each {report.expert}, by {report.noun}"
    return folded("The same as numbers", grid(title, report.expert, columns, rows))
