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
from expertmix.report.layers import EVERYWHERE
from expertmix.report.markup import Html, join, sentence, tag
from expertmix.report.palette import PETROFF, expert_colors
from expertmix.report.report import Report
from expertmix.report.section import Section
from expertmix.report.strips import Strip

_HOW_TO_KEEP_TEXT = (
    "The words were left out of this recording, as they are unless asked for; each block stands "
    "for one token. To keep them, record with `expertmix {} --text`, or in Python with "
    "record(model, tokenizer=tokenizer)."
)
_COMMAND = {"expert": "trace", "adapter": "compose"}


def section(report: Report) -> Section | None:
    """The strips with a slider for the site; None where the caller wanted none."""
    if not report.strips:
        return None
    parts = [
        *_notes(report),
        _controls(report),
        tag(
            "div", {"id": "legend", "class": "legend", "aria-label": f"Colors of {report.expert}s"}
        ),
        tag("p", {"id": "readout", "class": "readout", "aria-live": "polite"}, _INVITATION),
        *(_strip(strip, number) for number, strip in enumerate(report.strips)),
    ]
    verb = "made" if report.answers else "reads"
    got = "had most weight where it was made" if report.answers else "got most of its weight"
    return Section(
        key="tokens",
        title=f"Which {report.expert} {verb} which token?",
        headline=headline(report),
        reading=(
            f"{_ANSWERED if report.answers else ''}Every token has the color of the "
            f"{report.expert} that {got}; the stronger the color, the larger that part. Move the "
            f"slider to go through the {report.noun}s, point at a token to see all its "
            f"{report.expert}s, click an {report.expert} to see its tokens alone."
        ),
        body=join(parts),
        summary=False,
    )


_ANSWERED = "These are the answers. A token is made where the one before it is read. "
_LONGEST_PROMPT = 400  # letters
_ALIKE = f"Beyond {len(PETROFF)} colors come close to each other: point at a token to be sure."
_INVITATION = "Point at a token, or tap it, to see who worked on it."


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
        f"{_at(report, site)}, a token goes to the same {report.expert} as the one before it "
        f"{words.percent(same / pairs)} of the time."
    )


def _at(report: Report, site: Site) -> str:
    return "Over all layers" if site == EVERYWHERE else f"At {report.place(site)}"


def default_site(report: Report) -> Site:
    """Where the slider starts: all layers, or the site at which the kinds of text differ most."""
    if report.layers is not None:
        return EVERYWHERE
    ran = [site for site in report.ran if not math.isnan(site.specialization)]
    if not ran:
        return report.ran[len(report.ran) // 2].site
    return max(ran, key=lambda site: site.specialization).site


def to_json(report: Report) -> dict[str, Any] | None:
    """Everything that the script needs to color the strips."""
    if not report.strips:
        return None
    sites = report.strip_sites
    number = {id(group): place for place, group in enumerate(report.groups)}
    return {
        "noun": report.noun,
        "start": sites.index(default_site(report)),
        "sites": [
            {"name": report.short(site), "group": number[id(report.group_of(site))]}
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
    how = _HOW_TO_KEEP_TEXT.format(_COMMAND[report.expert])
    notes = [how] * silent + [_ALIKE] * many
    return [tag("p", {"class": "reading"}, sentence(note)) for note in notes]


def _controls(report: Report) -> Html:
    """A slider over the sites; nothing to choose where there is one."""
    sites = report.strip_sites
    if len(sites) < 2:
        return Html("")
    slider = {
        "type": "range", "id": "strip-site", "min": "0", "max": str(len(sites) - 1),
        "value": str(sites.index(default_site(report))), "step": "1",
    }  # fmt: skip
    return tag(
        "p",
        {"class": "controls slider"},
        tag("label", {"for": "strip-site"}, report.noun.capitalize()),
        tag("input", slider),
        tag(
            "output",
            {"id": "strip-site-name", "for": "strip-site"},
            report.short(default_site(report)),
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
    return join([heading, _asked(strip), shown])


def _asked(strip: Strip) -> Html:
    if strip.prompt is None:
        return Html("")
    return tag("p", {"class": "asked"}, words.ending(strip.prompt, _LONGEST_PROMPT))


def _tokens(strip: Strip) -> list[Html]:
    if strip.tokens is None:
        return [tag("i", {}) for _ in range(strip.length)]
    return [tag("i", {}, token) for token in words.readable_tokens(strip.tokens)]
