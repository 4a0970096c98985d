"""How charts are drawn: plotly figures as plain dicts, in one quiet style.

plotly itself is not imported: the page carries plotly.js, which reads these dicts. Names come from
models, and plotly reads a little HTML in any text, so every name goes through `label`.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from expertmix.report import words
from expertmix.report.palette import INK, SEQUENTIAL, share_scale

Json = dict[str, Any]

_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
_ROW = 40  # letters that fit below a chart on a narrow screen
_COLUMNS = 11  # names that fit side by side; of slanted ones four times as many
_SHORT_NAME = 4  # letters that fit below a column, side by side
_LINE = 13  # pixels from one name of a row to the next: fewer, and they touch
_SMALL = 11  # pixels of the letters of rows that stand close
_STEPS = (1, 2, 5, 10, 20, 50, 100, 1_000, 10_000, 100_000)
GRID = "#e6e3dc"
MANY = 24  # columns: more of them need a wide plot


@dataclass(frozen=True)
class Plot:
    """One chart.

    Attributes:
        key: Unique on the page; the id of its element.
        title: Accessible name: what a reader who cannot see it is told.
        data: plotly traces.
        layout: plotly layout; `height` is in pixels.
        choices: Named replacements of the first trace's z, for a menu over the chart.
        choice_noun: What one chooses.
        color_key: What the color means, and the value of the darkest one.
        wide: Scrolls sideways on a narrow screen instead of shrinking.
    """

    key: str
    title: str
    data: Sequence[Json]
    layout: Json
    choices: Mapping[str, Sequence[Sequence[float | None]]] = field(default_factory=dict)
    choice_noun: str = ""
    color_key: tuple[str, float] | None = None
    wide: bool = False

    @property
    def height(self) -> int:
        """Pixels."""
        return int(self.layout["height"])

    def to_json(self) -> Json:
        """What the page's script needs."""
        return {
            "data": list(self.data),
            "layout": self.layout,
            "choices": list(self.choices.values()),
        }


def label(name: str, longest: int = 24) -> str:
    """A name as plotly text: escaped, and cut where it would fill the chart."""
    return html.escape(words.cut(name, longest), quote=False)


def labels(names: Sequence[str]) -> list[str]:
    """Names as the categories of an axis, all different: plotly merges equal ones."""
    cut = [label(name) for name in names]
    seen: dict[str, int] = {}
    unique = []
    for name in cut:
        seen[name] = seen.get(name, 0) + 1
        unique.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return unique


def axis_title(name: str) -> Json:
    """The title of an axis, no larger than its numbers, and clear of slanted names."""
    return {"text": label(name), "font": {"size": 13}, "standoff": 6}


def base_layout(height: int) -> Json:
    """The style that all charts share."""
    axis: Json = {"gridcolor": GRID, "zeroline": False, "automargin": True, "fixedrange": True}
    return {
        "height": height,
        "font": {"family": _FONT, "size": 13, "color": INK},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 16, "r": 16, "t": 40, "b": 40},
        "hoverlabel": {"bgcolor": "#ffffff", "bordercolor": "#c9c5bb", "font": {"color": INK}},
        "xaxis": dict(axis),
        "yaxis": dict(axis),
    }


def heat_map(
    z: Sequence[Sequence[float | None]],
    *,
    columns: Sequence[str],
    rows: Sequence[str],
    column_title: str,
    hover: str,
    top: float,
) -> tuple[Json, Json]:
    """Trace and layout of a heat map of shares, first row on top.

    Args:
        z: One list per row, in 0..1.
        columns: Their names.
        rows: Their names.
        column_title: What the columns are.
        hover: plotly hover template with %{x}, %{y} and %{z}.
        top: Value of the darkest color.
    """
    gap = 1 if len(rows) <= 40 and len(columns) <= 64 else 0
    trace: Json = {
        "type": "heatmap", "z": z, "x": labels(columns), "y": labels(rows), "zmin": 0, "zmax": top,
        "xgap": gap, "ygap": gap, "hoverongaps": False, "showscale": False,
        "colorscale": [list(stop) for stop in share_scale(SEQUENTIAL)],
        "hovertemplate": f"{hover}<extra></extra>",
    }  # fmt: skip
    height = _rows_height(len(rows))
    layout = base_layout(height + 60)
    layout["margin"]["t"] = 4
    layout["xaxis"] |= {"title": axis_title(column_title), "showgrid": False, **ticks(columns)}
    layout["yaxis"] |= {"autorange": "reversed", "showgrid": False, **_row_ticks(rows, height)}
    return trace, layout


def _row_ticks(names: Sequence[str], height: int) -> Json:
    """An axis of rows that names as many of them as stand clear of each other."""
    step = next(step for step in _STEPS if step * height >= _LINE * len(names))
    small = {"tickfont": {"size": _SMALL}} if height < 20 * len(names) else {}
    shown = labels(names)[::step]
    return {"type": "category", "tickmode": "array", "tickvals": shown, **small}


def ticks(names: Sequence[str]) -> Json:
    """An axis of columns that names every second, fifth, tenth … column, so that names never touch.

    plotly thins the ticks of numbers, but not those of categories.
    """
    longest = max(map(len, names))
    long = longest > _SHORT_NAME
    crowded = long and longest * len(names) > _ROW
    room = 4 * _COLUMNS if long else _COLUMNS
    step = next(step for step in _STEPS if len(names) / step <= room)
    return {
        "type": "category", "tickmode": "array", "tickangle": -55 if crowded else 0,
        "tickvals": labels(names)[::step],
    }  # fmt: skip


def _rows_height(rows: int) -> int:
    per_row = 28 if rows <= 12 else 20 if rows <= 24 else 14 if rows <= 72 else 7
    return max(90, min(1100, rows * per_row))
