"""A curve as a drawing inside the page, which needs no script: `sparkline`.

It shows in what is folded, where a chart that is drawn on loading has no width yet.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from expertmix.report import words
from expertmix.report.markup import Html, tag
from expertmix.report.palette import INK, PETROFF
from expertmix.report.plots import GRID

_WIDTH, _HEIGHT = 420, 130
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 12, 12, 26


def sparkline(values: Sequence[float], title: str) -> Html:
    """Values over steps 0, 1, …; those that are no numbers are left out.

    Args:
        values: At least one number among them.
        title: What a reader who cannot see it is told.
    """
    known = [(step, value) for step, value in enumerate(values) if math.isfinite(value)]
    low, high = min(value for _, value in known), max(value for _, value in known)
    spread = high - low or abs(high) or 1.0
    last = max(1, len(values) - 1)

    def place(step: float, value: float) -> tuple[float, float]:
        x = _LEFT + (_WIDTH - _LEFT - _RIGHT) * step / last
        y = _TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - value) / spread
        return round(x, 1), round(y, 1)

    points = [place(step, value) for step, value in known]
    line = tag(
        "polyline",
        {
            "points": " ".join(f"{x},{y}" for x, y in points),
            "fill": "none", "stroke": PETROFF[0], "stroke-width": "2",
        },
    )  # fmt: skip
    dots = [_dot(x, y) for x, y in points]
    levels = [_level(value, place(0, value)[1]) for value in dict.fromkeys((high, low))]
    steps = [
        _text(str(step), place(step, low)[0], _HEIGHT - 8, "middle")
        for step in range(0, len(values), max(1, math.ceil(last / 10)))
    ]
    return tag(
        "svg",
        {
            "viewBox": f"0 0 {_WIDTH} {_HEIGHT}", "class": "curve", "role": "img",
            "aria-label": title,
        },
        *(part for level in levels for part in level), line, *dots, *steps,
    )  # fmt: skip


def _dot(x: float, y: float) -> Html:
    return tag("circle", {"cx": f"{x}", "cy": f"{y}", "r": "3", "fill": PETROFF[0]})


def _level(value: float, y: float) -> tuple[Html, Html]:
    rule = tag(
        "line",
        {
            "x1": str(_LEFT), "x2": str(_WIDTH - _RIGHT), "y1": f"{y}", "y2": f"{y}",
            "stroke": GRID,
        },
    )  # fmt: skip
    return rule, _text(words.decimal(value, 4), _LEFT - 8, y + 4, "end")


def _text(shown: str, x: float, y: float, anchor: str) -> Html:
    return tag(
        "text",
        {"x": f"{x}", "y": f"{y}", "text-anchor": anchor, "font-size": "12", "fill": INK},
        shown,
    )
