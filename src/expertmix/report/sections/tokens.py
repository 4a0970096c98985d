"""Which expert reads which token: strips of text, colored by first choice.

The strips are plain text here; the page's script colors them for the chosen site, from the data
that `to_json` packs. Without a script the text can still be read.

Legend: n tokens of a strip, K selected experts.
"""

from __future__ import annotations

import base64
import math
import struct
from typing import Any

from torch import Tensor

from expertmix.core.site import Site
from expertmix.report import words
from expertmix.report.markup import Html, join, tag
from expertmix.report.palette import PETROFF, expert_colors
from expertmix.report.report import Report
from expertmix.report.section import Section
from expertmix.report.strips import Strip

_HOW_TO_KEEP_TEXT = (
    "The words were left out of this recording, as they are unless asked for; each block stands "
    "for one token. To keep them, record with `expertmix trace --text`, or in Python with "
    "record(model, tokenizer=tokenizer)."
)


def section(report: Report) -> Section | None:
    """The strips with a slider for the site; None where the caller wanted none."""
    if not report.strips:
        return None
    parts = [
        *_notes(report),
        _controls(report),
        tag("div", {"id": "legend", "class": "legend", "aria-label": "Experts and their colors"}),
        tag("p", {"id": "readout", "class": "readout", "aria-live": "polite"}, _INVITATION),
        *(_strip(strip, number) for number, strip in enumerate(report.strips)),
    ]
    return Section(
        key="tokens",
        title="Which expert reads which token?",
        headline=headline(report),
        reading=(
            f"Every token has the color of the expert that got most of its weight; the stronger "
            f"the color, the larger that part. Move the slider to go through the {report.noun}s, "
            f"point at a token to see all its experts, click an expert to see its tokens alone."
        ),
        body=join(parts),
        summary=False,
    )


_ALIKE = (
    f"Beyond {len(PETROFF)} experts colors come close to each other: point at a token to be sure "
    f"of its expert."
)
_INVITATION = "Point at a token, or tap it, to see its experts."


def headline(report: Report) -> str:
    """How long the router stays with an expert."""
    site = default_site(report)
    same = pairs = 0
    for strip in report.strips:
        first_n = strip.experts[site][:, 0]
        same += int(((first_n[1:] == first_n[:-1]) & (first_n[1:] >= 0)).sum())
        pairs += max(0, len(first_n) - 1)
    if not pairs:
        return ""
    return (
        f"At {report.place(site)}, a token goes to the same expert as the one before it "
        f"{words.percent(same / pairs)} of the time."
    )


def default_site(report: Report) -> Site:
    """Where the slider starts: the site at which the kinds of text differ most."""
    ran = [site for site in report.ran if not math.isnan(site.specialization)]
    if not ran:
        return report.ran[len(report.ran) // 2].site
    return max(ran, key=lambda site: site.specialization).site


def to_json(report: Report) -> dict[str, Any] | None:
    """Everything that the script needs to color the strips."""
    if not report.strips:
        return None
    sites = [site.site for site in report.ran]
    number = {id(group): place for place, group in enumerate(report.groups)}
    return {
        "noun": report.noun,
        "start": sites.index(default_site(report)),
        "sites": [
            {"name": report.names[site], "group": number[id(report.group_of(site))]}
            for site in sites
        ],
        "groups": [
            {"experts": list(group.experts), "colors": expert_colors(len(group.experts))}
            for group in report.groups
        ],
        "strips": [[_packed(strip, site) for site in sites] for strip in report.strips],
    }


def _packed(strip: Strip, site: Site) -> list[str | int]:
    """K, then base64 of n × K expert numbers (uint16, little endian), then of shares in 1/255."""
    experts_nK, shares_nK = strip.experts[site], strip.shares[site]
    numbers = [number if number >= 0 else 0xFFFF for number in _flat(experts_nK)]
    shares = [round(255 * share) for share in _flat(shares_nK)]
    return [
        experts_nK.shape[1],
        base64.b64encode(struct.pack(f"<{len(numbers)}H", *numbers)).decode(),
        base64.b64encode(bytes(shares)).decode(),
    ]


def _flat(values: Tensor) -> list[Any]:
    return list(values.flatten().tolist())


def _notes(report: Report) -> list[Html]:
    """What a reader could otherwise misread."""
    silent = all(strip.tokens is None for strip in report.strips)
    many = any(len(group.experts) > len(PETROFF) for group in report.groups)
    notes = [_HOW_TO_KEEP_TEXT] * silent + [_ALIKE] * many
    return [tag("p", {"class": "reading"}, note) for note in notes]


def _controls(report: Report) -> Html:
    """A slider over the sites; nothing to choose where there is one."""
    if len(report.ran) < 2:
        return Html("")
    slider = {
        "type": "range", "id": "strip-site", "min": "0", "max": str(len(report.ran) - 1),
        "value": str([site.site for site in report.ran].index(default_site(report))), "step": "1",
    }  # fmt: skip
    return tag(
        "p",
        {"class": "controls slider"},
        tag("label", {"for": "strip-site"}, report.noun.capitalize()),
        tag("input", slider),
        tag(
            "output",
            {"id": "strip-site-name", "for": "strip-site"},
            report.names[default_site(report)],
        ),
    )


def _strip(strip: Strip, number: int) -> Html:
    title = strip.label or f"sample {strip.sample}"
    shown = tag(
        "p",
        {
            "class": "strip" if strip.tokens is not None else "strip blocks",
            "data-strip": str(number),
            "tabindex": "0",
        },
        *_tokens(strip),
        tag("span", {"class": "cut"}, " …") if strip.cut else Html(""),
    )
    heading = tag(
        "h3",
        {"class": "strip-title"},
        title,
        tag("span", {"class": "strip-share", "data-share": ""}),
    )
    return join([heading, shown])


def _tokens(strip: Strip) -> list[Html]:
    if strip.tokens is None:
        return [tag("i", {}) for _ in range(strip.length)]
    return [tag("i", {}, token) for token in words.readable_tokens(strip.tokens)]
