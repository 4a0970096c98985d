"""Where tokens go from layer to layer: a flow chart of first choices.

Legend: E experts of a site, M nodes of a column (experts, and one for the rest).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor

from expertmix.attribute.tally import Transition
from expertmix.core.site import Site
from expertmix.report import words
from expertmix.report.palette import expert_colors, translucent
from expertmix.report.plots import Json, Plot, base_layout, label
from expertmix.report.report import Report
from expertmix.report.section import Section, chart

_MOST_NODES = 12  # experts of a column that are shown; the others are one node
_REST = "#b9bdc5"
_PAD = 9  # pixels between nodes
_HEIGHT = 520
_MARGIN = 46  # above the columns, for their names


@dataclass(frozen=True, eq=False)
class _Column:
    """One site of the chart.

    Attributes:
        site: The site.
        place: (E,) int64, node of each expert, within the column.
        names: M names.
        colors: M colors.
    """

    site: Site
    place: Tensor
    names: list[str]
    colors: list[str]


def section(report: Report) -> Section | None:
    """The flow, unless there is only one site."""
    # a site that never ran ends the chart: its neighbors do not join up
    moves = list(takewhile(lambda move: int(move.counts.sum()), _steps(report)))
    if not moves:
        return None
    plot = _plot(report, moves)
    return Section(
        key="flow",
        title=f"Where do tokens go from {report.noun} to {report.noun}?",
        headline=headline(report, moves),
        reading=(
            f"Each column is a {report.noun}, each block an {report.expert}, as tall as the "
            "number of "
            f"tokens that chose it first. A ribbon is tokens on their way from one to the next: "
            f"thick ribbons are beaten paths."
        ),
        body=chart(plot, _caption(report, moves)),
        plots=(plot,),
    )


def headline(report: Report, moves: Sequence[Transition]) -> str:
    """How many tokens keep their expert, or the most common path where experts have no names."""
    ends = _ends(report, moves)
    source, target = report.group_of(ends.source), report.group_of(ends.target)
    places = f"{report.place(ends.source)} to {report.place(ends.target)}"
    if source is target and source.named:
        return (
            f"{words.percent(ends.kept)} of tokens have the same first-choice {report.expert} at "
            "both ends "
            f"of the model ({places})."
        )
    return _beaten_path(report, moves)


def _beaten_path(report: Report, moves: Sequence[Transition]) -> str:
    """The step between two columns that most tokens take."""
    move = max(moves, key=lambda move: int(move.counts.max()) / int(move.counts.sum()))
    row, column = divmod(int(move.counts.argmax()), move.counts.shape[1])
    most = int(move.counts.max())
    source, target = report.group_of(move.source), report.group_of(move.target)
    return (
        f"The most beaten path leads from {source.expert(row)} at {report.place(move.source)} to "
        f"{target.expert(column)} at {report.place(move.target)}: "
        f"{words.percent(most / int(move.counts.sum()))} of all tokens take it, and "
        f"{words.percent(most / int(move.counts[row].sum()))} of the tokens of the first."
    )


def _steps(report: Report) -> tuple[Transition, ...]:
    """Transitions between neighboring columns: all but the one from end to end."""
    every = report.usage.transitions
    return every[:-1] if len(every) > 2 else every[:1]


def _ends(report: Report, moves: Sequence[Transition]) -> Transition:
    last = report.usage.transitions[-1]
    return last if int(last.counts.sum()) else moves[0]


def _caption(report: Report, moves: Sequence[Transition]) -> str:
    sites = [moves[0].source, *(move.target for move in moves)]
    names = words.listed([report.names[site] for site in sites])
    lumped = any(len(report.group_of(site).experts) > _MOST_NODES for site in sites)
    rest = (
        f" Only the {_MOST_NODES - 1} {report.expert}s with most tokens have a block of their own."
        if lumped else ""
    )  # fmt: skip
    return f"First choices at {report.noun}s {names}, evenly spaced over the model.{rest}"


def _plot(report: Report, moves: Sequence[Transition]) -> Plot:
    columns = [_column(report, moves[0].source, moves[0].counts.sum(1))]
    columns += [_column(report, move.target, move.counts.sum(0)) for move in moves]
    flows = [
        _lump(move.counts, left, right)
        for move, left, right in zip(moves, columns, columns[1:], strict=False)
    ]
    layout = base_layout(_HEIGHT)
    layout["margin"] |= {"t": _MARGIN, "b": 12, "l": 12, "r": 12}
    layout["annotations"] = [
        _heading(report.place(column.site), number / len(flows))
        for number, column in enumerate(columns)
    ]
    return Plot(
        "flow-chart",
        f"Flow chart of tokens between {report.expert}s. {headline(report, moves)}",
        [_sankey(columns, flows)],
        layout,
        wide=True,
    )


def _column(report: Report, site: Site, tokens_E: Tensor) -> _Column:
    names = report.group_of(site).experts
    colors = expert_colors(len(names))
    if len(names) <= _MOST_NODES:
        return _Column(site, torch.arange(len(names)), list(names), colors)
    shown = tokens_E.argsort(descending=True, stable=True)[: _MOST_NODES - 1].sort().values.tolist()
    place_E = torch.full((len(names),), len(shown), dtype=torch.int64)
    place_E[shown] = torch.arange(len(shown))
    rest = f"{len(names) - len(shown)} others"
    return _Column(
        site, place_E, [*(names[e] for e in shown), rest], [*(colors[e] for e in shown), _REST]
    )


def _lump(counts_EE: Tensor, left: _Column, right: _Column) -> Tensor:
    """(M, M') tokens between nodes."""
    narrow = counts_EE.new_zeros(len(left.names), counts_EE.shape[1])
    narrow.index_add_(0, left.place, counts_EE)
    lumped = counts_EE.new_zeros(len(left.names), len(right.names))
    return lumped.index_add_(1, right.place, narrow)


def _sankey(columns: Sequence[_Column], flows: Sequence[Tensor]) -> Json:
    tokens = [flows[0].sum(1), *(flow.sum(0) for flow in flows)]
    starts = [0]
    for column in columns:
        starts.append(starts[-1] + len(column.names))
    links: Json = {"source": [], "target": [], "value": [], "color": []}
    for number, flow in enumerate(flows):
        for row, column in (flow > 0).nonzero().tolist():
            links["source"].append(starts[number] + row)
            links["target"].append(starts[number + 1] + column)
            links["value"].append(int(flow[row, column]))
            links["color"].append(translucent(columns[number].colors[row], 0.38))
    linked = sorted({*links["source"], *links["target"]})
    place = {node: number for number, node in enumerate(linked)}
    ends = {key: [place[node] for node in links[key]] for key in ("source", "target")}
    return {
        "type": "sankey", "arrangement": "fixed", "valueformat": ",d", "valuesuffix": " tokens",
        "node": _nodes(columns, tokens, linked), "link": links | ends,
    }  # fmt: skip


def _nodes(columns: Sequence[_Column], tokens: Sequence[Tensor], linked: Sequence[int]) -> Json:
    """Those with a link: plotly drops the others, and gives their places to those that follow."""
    x = [number / (len(columns) - 1) for number, one in enumerate(columns) for _ in one.names]
    every: Json = {
        "label": [label(name, 16) for column in columns for name in column.names],
        "color": [color for column in columns for color in column.colors],
        "x": [min(0.999, max(0.001, value)) for value in x],  # plotly takes 0 for "not given"
        "y": [y for column in _heights(tokens) for y in column],
    }
    return {
        **{key: [values[node] for node in linked] for key, values in every.items()},
        "pad": _PAD, "thickness": 14, "line": {"width": 0},
        "hovertemplate": "%{label}: %{value}<extra></extra>",
    }  # fmt: skip


def _heights(tokens: Sequence[Tensor]) -> list[list[float]]:
    """Centers of the nodes in 0..1 from the top, in the experts' order, with room between them."""
    pad = _PAD / (_HEIGHT - _MARGIN - 12)
    free = [1 - pad * (len(column) - 1) for column in tokens]
    scale = min(f / max(1, int(c.sum())) for f, c in zip(free, tokens, strict=True))
    placed = []
    for column in tokens:
        top, centers = 0.0, []
        for count in column.tolist():
            centers.append(round(min(0.999, max(0.001, top + count * scale / 2)), 4))
            top += count * scale + (pad if count else 0)
        placed.append(centers)
    return placed


def _heading(name: str, x: float) -> Json:
    anchor = "left" if x == 0 else "right" if x == 1 else "center"
    return {
        "text": label(name), "x": x, "y": 1, "xref": "paper", "yref": "paper", "xanchor": anchor,
        "yanchor": "bottom", "yshift": 8, "showarrow": False,
    }  # fmt: skip
