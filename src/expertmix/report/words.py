"""How numbers, lists and tokens are said to a reader. It knows nothing of HTML or traces."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

DASH = "\u2013"  # where there is no number
_MINUS = "\u2212"
TIGHT = "\u00a0"  # a space at which no line breaks
_NARROW_SPACE = "\u202f"  # between a number and its percent sign
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tabs and line breaks


def all_text(labels: Iterable[str]) -> str:
    """What all text together is called, beside labels of which one may be called just so."""
    return "(all text)" if "all text" in labels else "all text"


def percent(share: float) -> str:
    """A share in 0..1 as a whole percentage; a dash for nan."""
    if math.isnan(share):
        return DASH
    hundred = 100 * share
    if 0 < hundred < 0.5:
        return f"<1{_NARROW_SPACE}%"
    if 99.5 <= hundred < 100:
        return f">99{_NARROW_SPACE}%"
    return f"{hundred:.0f}{_NARROW_SPACE}%"


def even_share(of: int) -> str:
    """One part of so many equal ones, to three digits: `12.5 %`."""
    return f"{100 / of:.3g}{_NARROW_SPACE}%"


def decimal(value: float, digits: int = 2) -> str:
    """A number; a dash for nan."""
    rounded = value if math.isnan(value) else round(value, digits) + 0.0  # no minus before a zero
    return DASH if math.isnan(value) else f"{rounded:.{digits}f}".replace("-", _MINUS)


def signed(value: float, digits: int = 2) -> str:
    """A number with its sign, which a rounded zero has not; a dash for nan."""
    rounded = round(value, digits) if not math.isnan(value) else value
    return decimal(rounded + 0.0, digits) if not rounded > 0 else f"+{rounded:.{digits}f}"


def count(value: int) -> str:
    """12,345."""
    return f"{value:,}"


def counted(value: int, noun: str) -> str:
    """`1 token`, `2 tokens`."""
    return f"{count(value)} {noun}" if value == 1 else f"{count(value)} {noun}s"


def span(values: Sequence[int]) -> str:
    """`8`, or `8–64` where they differ."""
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}{DASH}{high}"


def named(name: str) -> str:
    """A name between back quotes, which a page sets apart; its own ones would end it early."""
    quoted = name.replace("`", "'")
    return f"`{quoted}`"


def printable(value: str) -> str:
    """Text that a terminal only shows: what would move its cursor or recolor it becomes a mark."""
    return _CONTROL.sub("\ufffd", value)


def cut(name: str, longest: int) -> str:
    """A name that is not longer than that."""
    return name if len(name) <= longest else f"{name[: longest - 1]}…"


def ending(value: str, longest: int) -> str:
    """The end of a text, where that is what counts: of a prompt, what an answer goes on from."""
    return value if len(value) <= longest else f"… {value[-longest:]}"


def listed(names: Sequence[str], most: int = 8) -> str:
    """`a, b and c`; long lists are cut and say how much."""
    if len(names) > most:
        return f"{', '.join(names[:most])} and {len(names) - most} more"
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)


def rounded(values: Sequence[float], digits: int = 4) -> list[float | None]:
    """Short numbers for JSON, which has no nan."""
    return [None if math.isnan(value) else round(value, digits) for value in values]


def readable_tokens(tokens: Sequence[str]) -> list[str]:
    """Token strings as people read them: real spaces, real letters, a mark for a line break.

    Byte-level vocabularies (GPT-2's and most since) write every byte as a printable character; they
    are told by the characters that stand for space and line feed.
    """
    byte_level = any("Ġ" in token or "Ċ" in token for token in tokens)
    decode = _from_bytes if byte_level else _from_pieces
    return [decode(token).replace("\r", "").replace("\n", "↵\n") for token in tokens]


def _from_pieces(token: str) -> str:
    return "\n" if token == "<0x0A>" else token.replace("▁", " ")


def _from_bytes(token: str) -> str:
    if not all(character in _BYTE_OF for character in token):
        return token  # a special token, which is stored as it reads
    return bytes(_BYTE_OF[character] for character in token).decode("utf-8", errors="replace")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's table of bytes: printable ones stand for themselves, the others from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + number): byte for number, byte in enumerate(others)
    }


_BYTE_OF = _byte_alphabet()
