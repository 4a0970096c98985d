"""Where in the model an adapter uses many directions: a heat map of adapters by layers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from expertmix.attribute.modules import split
from expertmix.core.site import Site
from expertmix.report import places, words
from expertmix.report.palette import SEQUENTIAL
from expertmix.report.plots import Json, Plot, heat_map
from expertmix.report.section import Section, chart
from expertmix.report.shelf_report import ShelfReport

_ALL = "all modules"


def section(report: ShelfReport) -> Section | None:
    """Effective rank, layer by layer, with a menu for the kind of module; None for one layer."""
    found = {split(Site(module)).layer for module in report.ranks.modules}
    layers = sorted(found, key=_natural)
    if len(layers) < 2:
        return None
    plot = _plot(report, layers)
    return Section(
        key="ranks",
        title="Where does an adapter use many directions?",
        reading=(
            "Each row is an adapter, each column a layer of the model. The darker a cell, the more "
            "directions the adapter effectively uses there; an empty one is a layer that it leaves "
            "alone."
        ),
        body=chart(
            plot,
            "Effective rank: exp of the entropy of the squared singular values, as shares (after "
            "Roy and Vetterli, 2007).",
        ),
        plots=(plot,),
        summary=False,
    )


def _plot(report: ShelfReport, layers: list[str]) -> Plot:
    kinds = sorted({split(Site(module)).kind for module in report.ranks.modules})
    menu = {_ALL: None} | ({kind: kind for kind in kinds} if len(kinds) > 1 else {})
    choices = {name: _map(report, layers, kind) for name, kind in menu.items()}
    top = max((v for z in choices.values() for row in z for v in row if v), default=1.0)
    short = places.short_names([Site(layer) for layer in layers])
    noun = places.noun(short)
    trace, layout = heat_map(
        choices[_ALL],
        columns=list(short.values()),
        rows=[report.names[number] for number in report.shown],
        column_title=noun,
        hover=f"%{{y}}, {noun} %{{x}}: effective rank %{{z:.2f}}",
        top=top,
    )
    title = f"Heat map of the effective rank of adapters by {noun}"
    layout["margin"]["r"] = 72  # for the bar
    return Plot("ranks-map", title, [trace | _scale(top)], layout, choices, "Modules")


def _scale(top: float) -> Json:
    """Even colors from rank 1 on, with a bar beside the map."""
    stops = [[place / (len(SEQUENTIAL) - 1), color] for place, color in enumerate(SEQUENTIAL)]
    bar = {"thickness": 12, "outlinewidth": 0, "nticks": 4}  # no title: a low map has no room
    return {
        "colorscale": stops,
        "zmin": 1,
        "zmax": max(2.0, top),
        "showscale": True,
        "colorbar": bar,
    }


def _map(report: ShelfReport, layers: list[str], kind: str | None) -> list[list[float | None]]:
    """Shown adapters by layers; a mean over modules."""
    table = report.ranks.effective[list(report.shown)]
    columns = [_layer(report, table, layer, kind) for layer in layers]
    rows = torch.stack(columns, 1).tolist()
    return [words.rounded(row, 2) for row in rows]


def _layer(report: ShelfReport, table: Tensor, layer: str, kind: str | None) -> Tensor:
    modules = [split(Site(module)) for module in report.ranks.modules]
    chosen = [
        number
        for number, one in enumerate(modules)
        if one.layer == layer and kind in (None, one.kind)
    ]
    if not chosen:
        return torch.full((len(table),), math.nan)
    return table[:, chosen].nanmean(1)


def _natural(name: str) -> list[tuple[int, str]]:
    """Layer 9 comes before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
