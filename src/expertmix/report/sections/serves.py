"""Which expert serves which text: a table of labels by experts."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from expertmix.attribute.tally import Tally
from expertmix.report import words
from expertmix.report.groups import Group, group_title
from expertmix.report.markup import Html, join, tag
from expertmix.report.palette import SEQUENTIAL
from expertmix.report.plots import MANY, Plot, heat_map
from expertmix.report.report import Report
from expertmix.report.section import CellStyle, Section, chart, grid, panels, shade

_WIDEST_TABLE = 16  # more experts are shown as a heat map without numbers

Measure = Callable[[Tally], Tensor]

_MEASURES: dict[str, Measure] = {
    "first choice (share of tokens that gave it their largest weight)": lambda t: t.first_choice,
    "called (share of tokens that used it at all)": lambda t: t.frequency,
    "weight (its mean share of a token's routing weight)": lambda t: t.normalized_mass,
}


def _measures(report: Report) -> dict[str, Measure]:
    """What is shown first comes first; weight, where first choices of many modules are pooled."""
    order = reversed(_MEASURES.items()) if report.by_weight else _MEASURES.items()
    return dict(order)


def section(report: Report) -> Section:
    """Labels by experts, or all text by experts where samples have no labels."""
    plots = tuple(
        _heat_map(report, group, number)
        for number, group in enumerate(report.groups)
        if len(group.experts) > _WIDEST_TABLE
    )
    drawn = iter(plots)
    bodies = [
        join([_title(report, group), _table(report, group, number)])
        if len(group.experts) <= _WIDEST_TABLE
        else join([_title(report, group), chart(next(drawn))])
        for number, group in enumerate(report.groups)
    ]
    return Section(
        key="serves",
        title=f"Which {report.expert} serves which text?",
        headline=headline(report),
        reading=_reading(report),
        body=join(bodies),
        plots=plots,
    )


def headline(report: Report) -> str:
    """The strongest pairing of a text and an expert."""
    group = max(report.groups, key=lambda group: len(group.sites))
    share, expert, label = _strongest(report, group)
    if report.by_weight:
        return _heaviest(report, group, share, expert, label)
    name = f"{report.expert} ".capitalize() + group.expert(expert).removeprefix("expert ")
    what = f"{words.named(label)} tokens" if label else "all tokens"
    return (
        f"{name} is the first choice for {words.percent(share)} of {what}{_where(report, group)}."
        f"{_own_names(report, group)}"
    )


def _heaviest(report: Report, group: Group, share: float, expert: int, label: str | None) -> str:
    where = f"on {words.named(label)} text" if label else "on all text"
    return (
        f"The strongest pairing: {words.named(group.experts[expert])} gets {words.percent(share)} "
        f"of the weight {where}; even shares would be {words.even_share(len(group.experts))}."
        f"{_own_names(report, group)}"
    )


def _strongest(report: Report, group: Group) -> tuple[float, int, str | None]:
    """Largest share of any label, its expert, its label."""
    labels: tuple[str | None, ...] = report.labels or (None,)
    found = [(*_favorite(report, group.tally(label)), label) for label in labels]
    return max(found, key=lambda one: one[0])


def _favorite(report: Report, tally: Tally) -> tuple[float, int]:
    shares_E = tally.normalized_mass if report.by_weight else tally.first_choice
    share, expert = shares_E.nan_to_num(-1).max(0)
    return float(share), int(expert)


def _own_names(report: Report, group: Group) -> str:
    """How many texts go to the expert that is called as they are."""
    own = [label for label in report.labels if label in group.experts] if group.named else []
    served = [
        label for label in own if group.experts[_favorite(report, group.tally(label))[1]] == label
    ]  # fmt: skip
    if len(own) < 2:
        return ""
    if len(own) == len(served):
        return (
            f" Each of the {len(own)} kinds of text goes first to the {report.expert} of its "
            "own name."
        )
    return (
        f" {len(served)} of {len(own)} kinds of text go first to the {report.expert} of their "
        "own name."
    )


def _where(report: Report, group: Group) -> str:
    if len(group.view) == 1:
        return f" at {report.place(group.view[0].site)}"
    return f", counted over {len(group.view)} {report.noun}s"


def _reading(report: Report) -> str:
    rows = (
        f"Each row is a kind of text, each column an {report.expert}. The darker a cell, the "
        f"larger the share of that text which went to that {report.expert}. If the router did not "
        "care about the kind "
        "of text, all rows would look alike."
        if report.labels
        else f"Each column is an {report.expert}; the darker its cell, the more it was used. The "
        "samples have no labels; give prompts a label (.jsonl), or record with labels=[…], to see "
        "one row per kind of text."
    )
    if len(report.labels) < len(report.usage.labels):
        rows += f" Of {len(report.usage.labels)} kinds of text, those with most tokens are shown."
    if all(group.comparable for group in report.groups):
        return rows
    return (
        f"{rows} The experts have no names, so expert 3 of one {report.noun} has nothing to do "
        f"with expert 3 of another: what you see is the {report.noun} where the texts differ most."
    )


def _title(report: Report, group: Group) -> Html:
    if len(report.groups) == 1 and group.comparable:
        return Html("")
    parts = [group_title(group)] if len(report.groups) > 1 else []
    parts += [_where(report, group).strip(" ,")]
    return tag("h3", {}, " · ".join(parts).capitalize())


def _rows(report: Report) -> dict[str, str | None]:
    """Row names with their labels; the last row is all text."""
    named: dict[str, str | None] = {label: label for label in report.labels}
    return named | {words.all_text(named): None}


def _table(report: Report, group: Group, number: int) -> Html:
    named = [
        (name, _measured(report, group, measure, name))
        for name, measure in _measures(report).items()
    ]
    return panels("Show", f"serves-{number}", named)


def _measured(report: Report, group: Group, measure: Measure, name: str) -> Html:
    rows = [
        (row, _cells(measure(group.tally(label)))) for row, label in _rows(report).items()
    ]  # fmt: skip
    return grid(f"Text by {report.expert}: {name}", "text", group.experts, rows)


def _cells(shares_E: Tensor) -> list[CellStyle]:
    best = float(shares_E.nan_to_num(-1).max())
    return [
        shade(
            words.percent(share), SEQUENTIAL, 0.0 if share != share else share, strong=share == best
        )
        for share in shares_E.tolist()
    ]


def _heat_map(report: Report, group: Group, number: int) -> Plot:
    rows = _rows(report)
    choices = {
        name: [words.rounded(measure(group.tally(label)).tolist()) for label in rows.values()]
        for name, measure in _measures(report).items()
    }
    first, *_ = choices.values()
    top = max((z for rows in choices.values() for row in rows for z in row if z), default=1.0)
    trace, layout = heat_map(
        first,
        columns=group.experts,
        rows=tuple(rows),
        column_title=report.expert,
        hover=f"%{{y}}, {report.expert} %{{x}}: %{{z:.1%}}",
        top=top,
    )
    title = f"Text by {report.expert}. {headline(report)}"
    key = f"serves-map-{number}"
    wide = len(group.experts) > MANY
    return Plot(key, title, [trace], layout, choices, "Show", ("share", top), wide)
