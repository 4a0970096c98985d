"""Which colors are used: one per expert, and the scales of heat maps.

The first ten are Petroff's (arXiv 2107.02270), chosen for people with color vision deficiencies;
his grays stand last.
Beyond ten no palette can tell all experts apart; then hues go round the OKLCH wheel by the golden
angle in three lightnesses, so that neighbors in number differ, and the page always offers the name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

INK = "#1f2430"

PETROFF = (
    "#3f90da", "#ffa90e", "#bd1f01", "#832db6", "#92dadd",
    "#a96b59", "#b9ac70", "#e76300", "#717581", "#94a4a2",
)  # fmt: skip

SEQUENTIAL = ("#f5f8fc", "#c9dcef", "#85b1d9", "#3d7cb8", "#164f8a", "#08264d")
DIVERGING = ("#1b5e9e", "#7fb0dc", "#f7f6f3", "#e9a466", "#a8480f")  # better, no change, worse

_GOLDEN_ANGLE = 137.50776
_LIGHTNESS = (0.70, 0.56, 0.82)


def expert_colors(count: int) -> list[str]:
    """A color for each expert, by number.

    Args:
        count: E.

    Returns:
        E strings `#rrggbb`.
    """
    if count <= len(PETROFF):
        return list(PETROFF[:count])
    return [_wheel(number) for number in range(count)]


def scale_color(scale: Sequence[str], place: float) -> str:
    """The color at a place in 0..1 of a scale of evenly spaced colors."""
    spot = min(1.0, max(0.0, place)) * (len(scale) - 1)
    low = min(int(spot), len(scale) - 2)
    return mix(scale[low], scale[low + 1], spot - low)


def mix(one: str, other: str, part: float) -> str:
    """`part` of the other color in the first."""
    pairs = zip(_channels(one), _channels(other), strict=True)
    return _hex([a + (b - a) * part for a, b in pairs])


def text_on(background: str) -> str:
    """Dark ink where it can be read, otherwise white or, on middle tones, black."""
    if contrast(INK, background) >= 4.5:
        return INK
    return max(("#ffffff", "#000000"), key=lambda color: contrast(color, background))


def contrast(one: str, other: str) -> float:
    """WCAG 2 contrast ratio, 1 to 21; text needs 4.5."""
    dark, light = sorted((_luminance(one), _luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def share_scale(scale: Sequence[str]) -> list[tuple[float, str]]:
    """Places in 0..1 and their colors, for shares: small ones differ more than large ones.

    Among 64 experts an even share is under 2 %; on an even scale it would be as good as white.
    """
    return [((number / (len(scale) - 1)) ** 1.6, color) for number, color in enumerate(scale)]


def translucent(color: str, alpha: float) -> str:
    """`rgba(…)`."""
    red, green, blue = (round(255 * value) for value in _channels(color))
    return f"rgba({red},{green},{blue},{alpha})"


def _channels(color: str) -> list[float]:
    return [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]


def _hex(channels: Sequence[float]) -> str:
    return "#" + "".join(f"{round(255 * min(1.0, max(0.0, value))):02x}" for value in channels)


def _luminance(color: str) -> float:
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in _channels(color)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _wheel(number: int) -> str:
    return _oklch(_LIGHTNESS[number % 3], 0.13, math.radians(number * _GOLDEN_ANGLE % 360))


def _oklch(lightness: float, chroma: float, hue: float) -> str:
    """OKLCH to sRGB (Ottosson, https://bottosson.github.io/posts/oklab/)."""
    a, b = chroma * math.cos(hue), chroma * math.sin(hue)
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    middle = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = (
        4.0767416621 * long - 3.3077115913 * middle + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * middle - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * middle + 1.7076147010 * short,
    )
    return _hex([_gamma(value) for value in linear])


def _gamma(value: float) -> float:
    return 12.92 * value if value <= 0.0031308 else 1.055 * value ** (1 / 2.4) - 0.055
