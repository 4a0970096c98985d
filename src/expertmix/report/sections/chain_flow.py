"""Where calls go from iteration to iteration of a chain: a flow chart of the strongest pairs.

Legend: E experts, M nodes of a column.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expertmix.attribute.chain import ChainUsage
from expertmix.report.palette import expert_colors, translucent
from expertmix.report.plots import Json, Plot, base_layout, label

_MOST_NODES = 12  # experts of a column
_RIBBONS = 40  # of a step: the strongest
_PAD = 8  # pixels between nodes
_TOP, _BOTTOM = 40, 12  # pixels around the columns
_GRAY = "#b9bdc5"


@dataclass(frozen=True, eq=False)
class _Column:
    """One iteration of the flow chart: the busiest experts, and one node for the rest.

    Attributes:
        place: (E,) int64, node of each expert.
        names: M names.
        colors: M colors.
    """

    place: Tensor
    names: list[str]
    colors: list[str]


def _column(usage: ChainUsage) -> _Column:
    """The same experts in every column, so that a level ribbon is one who stays."""
    every, colors = list(usage.experts), expert_colors(usage.info.num_experts)
    if len(every) <= _MOST_NODES:
        return _Column(torch.arange(len(every)), every, colors)
    shown = usage.busiest(_MOST_NODES - 1)
    place_E = torch.full((len(every),), len(shown))
    place_E[shown] = torch.arange(len(shown))
    rest = f"{len(every) - len(shown)} others"
    return _Column(
        place_E, [*(every[e] for e in shown), rest], [*(colors[e] for e in shown), _GRAY]
    )


def plot(usage: ChainUsage, name: str, finding: str) -> Plot:
    """The flow chart of a layer.

    Args:
        usage: What was counted.
        name: Its short name, unique on the page.
        finding: What stands out, for a reader who cannot see it.
    """
    column = _column(usage)
    nodes, steps = len(column.names), len(usage.iterations)
    links: Json = {"source": [], "target": [], "value": [], "color": []}
    for number, passage in enumerate(usage.passages):
        for row, place, value in _ribbons(passage.counts, column):
            links["source"].append(number * nodes + row)
            links["target"].append((number + 1) * nodes + place)
            links["value"].append(value)
            links["color"].append(translucent(column.colors[row], 0.42))
    layout = base_layout(max(300, min(520, 34 * nodes)))
    layout["margin"] |= {"t": _TOP, "b": _BOTTOM, "l": 12, "r": 12}
    layout["annotations"] = [
        _heading(f"#{one.site.step}", place / (steps - 1))
        for place, one in enumerate(usage.iterations)
    ]
    trace = {
        "type": "sankey", "arrangement": "fixed", "valueformat": ",d", "valuesuffix": " pairs",
        "node": _nodes(column, steps, links, layout["height"]), "link": _renumbered(links),
    }  # fmt: skip
    title = f"Flow chart of calls from iteration to iteration at layer {name}. {finding}"
    return Plot(f"chain-flow-{name}", title, [trace], layout, wide=steps > 3)


def _ribbons(counts_EE: Tensor, column: _Column) -> list[tuple[int, int, int]]:
    """(row, column, pairs of calls) of the strongest."""
    nodes = len(column.names)
    lumped = torch.zeros(nodes, nodes, dtype=torch.int64)
    narrow = torch.zeros(nodes, len(counts_EE), dtype=torch.int64)
    lumped.index_add_(1, column.place, narrow.index_add_(0, column.place, counts_EE))
    best = lumped.flatten().topk(min(_RIBBONS, lumped.numel()))
    pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
    return [(*divmod(place, nodes), value) for value, place in pairs if value]


def _linked(links: Json) -> list[int]:
    return sorted({*links["source"], *links["target"]})


def _renumbered(links: Json) -> Json:
    """Only nodes with a link are drawn: plotly would give the places of others away."""
    place = {node: number for number, node in enumerate(_linked(links))}
    return links | {key: [place[node] for node in links[key]] for key in ("source", "target")}


def _nodes(column: _Column, steps: int, links: Json, height: int) -> Json:
    nodes = len(column.names)
    linked = _linked(links)
    found = [divmod(node, nodes) for node in linked]
    return {
        "label": [label(column.names[row], 16) for _, row in found],
        "color": [column.colors[row] for _, row in found],
        "x": [_inside(step / (steps - 1)) for step, _ in found],
        "y": _centers(_sizes(links), linked, nodes, _PAD / (height - _TOP - _BOTTOM)),
        "pad": _PAD, "thickness": 14, "line": {"width": 0},
        "hovertemplate": "%{label}: %{value}<extra></extra>",
    }  # fmt: skip


def _sizes(links: Json) -> dict[int, int]:
    """What plotly makes a node as tall as: the larger of what comes in and what goes out."""
    into: dict[int, int] = {}
    out: dict[int, int] = {}
    for source, target, value in zip(links["source"], links["target"], links["value"], strict=True):
        out[source] = out.get(source, 0) + value
        into[target] = into.get(target, 0) + value
    return {node: max(into.get(node, 0), out.get(node, 0)) for node in into | out}


def _centers(sizes: dict[int, int], linked: Sequence[int], nodes: int, pad: float) -> list[float]:
    """Centers of the nodes in 0..1 from the top, in the experts' order, with room between them."""
    columns = [[n for n in linked if n // nodes == step] for step in {n // nodes for n in linked}]
    scale = min(
        (1 - pad * (len(members) - 1)) / sum(sizes[n] for n in members) for members in columns
    )
    center: dict[int, float] = {}
    for members in columns:
        top = 0.0
        for node in members:
            center[node] = _inside(top + sizes[node] * scale / 2)
            top += sizes[node] * scale + pad
    return [center[node] for node in linked]


def _inside(place: float) -> float:
    """Plotly takes 0 for "not given"."""
    return round(min(0.999, max(0.001, place)), 4)


def caption(usage: ChainUsage) -> str:
    """How to read it."""
    few = min(_RIBBONS, len(_column(usage).names) ** 2)
    return (
        f"The {few} strongest ribbons of each step: a ribbon is as thick as the number of pairs of "
        "calls, of one expert and then of the other, by the same token. Both columns list the "
        "experts in the same order, so a level ribbon is an expert that is called again."
    )


def _heading(name: str, x: float) -> Json:
    anchor = "left" if x == 0 else "right" if x == 1 else "center"
    return {
        "text": label(name), "x": x, "y": 1, "xref": "paper", "yref": "paper", "xanchor": anchor,
        "yanchor": "bottom", "yshift": 8, "showarrow": False,
    }  # fmt: skip
