"""The charts of a chain: sizes of updates, and per layer who follows whom, and when.

Legend: E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from expertmix.attribute.chain import ChainUsage
from expertmix.attribute.passage import Passage
from expertmix.core.estimate import Estimate
from expertmix.report import words
from expertmix.report.chain_trouble import share
from expertmix.report.markup import Html, join, tag
from expertmix.report.palette import PETROFF
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
from expertmix.report.section import CellStyle, chart, grid, swatches
from expertmix.report.sections import chain_flow

if TYPE_CHECKING:
    from expertmix.experts.chain_updates import LayerUpdates

_FEWEST_POINTS = 3  # fewer layers are a table, not a line
_MOST_ROWS = 64  # experts of a heat map
_FOLLOWERS = 8  # rows of the table
_GRAY = "#b9bdc5"
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star")
_LEANS = {"entry": "#1b6ca8", "accumulator": "#c2571a", "neither, or not clear": _GRAY}


@dataclass(frozen=True)
class Pictures:
    """What is shown of a layer.

    Attributes:
        body: Charts and a table.
        plots: Charts that stand in the body.
    """

    body: Html
    plots: tuple[Plot, ...]


def sizes(names: Mapping[str, str], updates: Sequence[LayerUpdates]) -> tuple[Plot, ...]:
    """A line per iteration over the layers; nothing where there are few layers or no sizes."""
    shown = [one for one in updates if one.name in names]
    if len(shown) < _FEWEST_POINTS:
        return ()
    places = [names[one.name] for one in shown]
    steps = max(len(one.size) for one in shown)
    traces = [_size_line(places, [one.size for one in shown], step) for step in range(steps)]
    layout = base_layout(320)
    layout["xaxis"] |= {"title": axis_title("layer"), **ticks(places)}
    layout["yaxis"] |= {"rangemode": "tozero", "title": axis_title("‖F(x)‖ / ‖x‖")}
    layout["legend"] = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}
    title = "Line chart of the size of the update of each iteration, by layer"
    return (Plot("chain-sizes", title, traces, layout),)


def _size_line(places: Sequence[str], by_layer: Sequence[Sequence[Estimate]], step: int) -> Json:
    none = Estimate(float("nan"))
    found = [layer[step] if step < len(layer) else none for layer in by_layer]
    return {
        "type": "scatter", "mode": "lines+markers", "name": f"iteration #{step}",
        "x": labels(places), "y": words.rounded([one.value for one in found]),
        "error_y": _bars(found), "line": {"color": PETROFF[step % len(PETROFF)], "width": 2},
        "marker": {"symbol": _SYMBOLS[step % len(_SYMBOLS)], "size": 7},
        "hovertemplate": f"layer %{{x}}: iteration #{step} %{{y:.3f}}<extra></extra>",
    }  # fmt: skip


def _bars(found: Sequence[Estimate]) -> Json:
    return {
        "type": "data", "symmetric": False, "thickness": 1, "width": 3, "color": "#565c6b",
        "array": words.rounded([one.high - one.value for one in found]),
        "arrayminus": words.rounded([one.value - one.low for one in found]),
    }  # fmt: skip


def layer(usage: ChainUsage, name: str) -> Pictures:
    """All of one layer.

    Args:
        usage: What was counted.
        name: Its short name, unique on the page.
    """
    plots = (_map(usage, name), chain_flow.plot(usage, name, strongest(usage)), _lean(usage, name))
    drawn = [
        chart(plots[0], _map_caption(usage)),
        _followers(usage, name),
        chart(plots[1], chain_flow.caption(usage)),
        swatches(list(_LEANS.items())),
        chart(plots[2], _lean_caption(usage)),
    ]
    return Pictures(join(drawn), plots)


def _step(passage: Passage) -> str:
    return f"#{passage.source.step} to #{passage.target.step}".replace(" ", words.TIGHT)


def _map(usage: ChainUsage, name: str) -> Plot:
    shown, every = usage.busiest(_MOST_ROWS), usage.experts
    names = [every[expert] for expert in shown]
    choices = {_step(one): _shares(one, shown) for one in usage.passages}
    known = [value for z in choices.values() for row in z for value in row if value is not None]
    top = max(known, default=1.0)
    trace, layout = heat_map(
        next(iter(choices.values())),
        columns=names, rows=names, column_title="expert called next", top=top,
        hover="after %{y}: %{z:.1%} of the next calls go to %{x}",
    )  # fmt: skip
    return Plot(
        f"chain-map-{name}",
        f"Heat map of which expert follows which at layer {name}: first the caller, then who "
        f"follows. {strongest(usage)}",
        [trace],
        layout,
        choices=choices if len(choices) > 1 else {},
        choice_noun="Iterations",
        color_key=("next calls", top),
        wide=len(names) > MANY,
    )


def _shares(passage: Passage, shown: Sequence[int]) -> list[list[float | None]]:
    share_EE = passage.share[list(shown)][:, list(shown)]
    return [words.rounded(row, 3) for row in share_EE.tolist()]


def _map_caption(usage: ChainUsage) -> str:
    left = usage.info.num_experts - _MOST_ROWS
    cut = f" Only the {_MOST_ROWS} experts with most calls are shown." if left > 0 else ""
    return (
        "A row is an expert of the earlier iteration; its colors say where the calls of the next "
        "iteration go, of the tokens that called it. Each call counts alike, whatever its weight. "
        f"Rows that look the same mean that it does not matter who was called before.{cut}"
    )


def strongest(usage: ChainUsage) -> str:
    """The pair that stands out most, in a sentence."""
    found = [
        (float(one.lift[pair]), one, pair) for one in usage.passages for pair in one.strongest(1)
    ]
    if not found:
        return "No expert follows another more often than by chance."
    lift, one, (before, after) = max(found, key=lambda item: item[0])
    name = usage.info.expert_name
    return (
        f"The clearest: {name(after)} follows {name(before)} ({_step(one)}) "
        f"{words.decimal(lift, 1)} times as often as by chance."
    )


def _followers(usage: ChainUsage, name: str) -> Html:
    rows = []
    for one in usage.passages:
        expected_EE, lift_EE, share_EE = one.expected, one.lift, one.share
        for pair in one.strongest(max(2, _FOLLOWERS // len(usage.passages))):
            before, after = (words.cut(usage.experts[expert], 12) for expert in pair)
            chance = float(expected_EE[pair] / expected_EE[pair[0]].sum())
            cells = [
                words.count(int(one.counts[pair])), share(float(share_EE[pair])),
                share(chance), words.decimal(float(lift_EE[pair]), 1),
            ]  # fmt: skip
            rows.append(
                (
                    f"{after} after {before}",
                    [CellStyle(c) for c in (_step(one), *cells)],
                )
            )
    if not rows:
        return tag("p", {"class": "none"}, "No expert follows another more often than by chance.")
    columns = ("iterations", "tokens", "of the next calls", "by chance", "times chance")
    caption = f"Strongest followers at layer {name}"
    return grid(caption, "who follows whom", columns, rows, css="grid loose short")


def _lean(usage: ChainUsage, name: str) -> Plot:
    calls_E, every = usage.calls, usage.experts
    known = [expert for expert in range(len(every)) if calls_E[expert]]
    order = sorted(known, key=lambda e: usage.last[e].value - usage.first[e].value)
    kinds = dict.fromkeys(usage.entries, "entry")
    kinds |= dict.fromkeys(usage.accumulators, "accumulator")
    colors = [_LEANS[kinds.get(expert, "neither, or not clear")] for expert in order]
    bar: Json = {
        "type": "bar", "x": labels([every[expert] for expert in order]),
        "y": words.rounded([usage.last[e].value - usage.first[e].value for e in order], 3),
        "marker": {"color": colors},
        "customdata": [words.rounded([usage.first[e].value, usage.last[e].value]) for e in order],
        "hovertemplate": "%{x}: %{customdata[0]:.0%} of its calls in the first iteration, "
        "%{customdata[1]:.0%} in the last<extra></extra>",
    }  # fmt: skip
    layout = base_layout(280)
    layout["margin"]["t"] = 8
    layout["bargap"] = 0.15
    layout["xaxis"] |= {"title": axis_title("expert"), **ticks([every[e] for e in order])}
    layout["yaxis"] |= {
        "range": [-1.02, 1.02], "tickvals": [-1, -0.5, 0, 0.5, 1],
        "ticktext": ["all first", "", "even", "", "all last"], "zeroline": True,
        "zerolinecolor": "#8b8f99",
    }  # fmt: skip
    title = f"Bar chart of when experts are called at layer {name}. {_lean_words(usage)}"
    return Plot(f"chain-lean-{name}", title, [bar], layout, wide=len(order) > MANY)


def _lean_words(usage: ChainUsage) -> str:
    def named(experts: Sequence[int]) -> str:
        return words.listed([usage.info.expert_name(expert) for expert in experts]) or "none"

    return (
        f"Entry experts, called mostly in the first iteration: {named(usage.entries)}. "
        f"Accumulators, called mostly in the last: {named(usage.accumulators)}."
    )


def _lean_caption(usage: ChainUsage) -> str:
    return (
        "Of an expert's calls, the share in the last iteration minus the share in the first. "
        f"{_lean_words(usage)} Mostly means two thirds, where the interval over texts leaves out "
        "one half."
    )
