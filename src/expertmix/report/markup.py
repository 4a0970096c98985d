"""How HTML is written: text is escaped, always, unless it is `Html` already.

Token strings, labels and expert names come from models and users and may hold markup of their own.
This file is the only place that turns text into HTML.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Mapping


class Html(str):
    """A string that is HTML; any other string is text and gets escaped."""

    __slots__ = ()


Attributes = Mapping[str, str | None]

_VOID = frozenset({"input", "br", "meta"})
_NAME = re.compile(r"`([^`]+)`")


def text(value: str) -> Html:
    """Escape a string, unless it is `Html`."""
    return value if isinstance(value, Html) else Html(html.escape(value, quote=True))


def join(parts: Iterable[str]) -> Html:
    """Parts one after another."""
    return Html("".join(text(part) for part in parts))


def tag(name: str, attributes: Attributes, *children: str) -> Html:
    """An element.

    Args:
        name: Of the element.
        attributes: By name; None leaves the attribute out, an empty string gives a bare one.
        children: Text is escaped, `Html` is kept.
    """
    given = "".join(
        f" {key}" if value == "" else f' {key}="{text(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    inner = join(children)
    return Html(f"<{name}{given}>" if name in _VOID else f"<{name}{given}>{inner}</{name}>")


def sentence(value: str) -> Html:
    """A sentence in which `names` between back quotes stand out."""
    return Html(_NAME.sub(r'<span class="name">\1</span>', text(value)))


def script_data(value: object) -> Html:
    """JSON that is safe inside a script element: it cannot close it, nor open a comment."""
    dumped = json.dumps(value, allow_nan=False, separators=(",", ":"), ensure_ascii=True)
    return Html(dumped.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))
