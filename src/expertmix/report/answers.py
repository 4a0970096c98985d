"""Answers for the terminal: every token in the color of the adapter that made it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.text import Text

from expertmix.report import words
from expertmix.report.palette import expert_colors, text_on

_MOST = 10  # adapters of a legend; the others are counted
_WIDTH = 80  # of a plain terminal
_NAME = 40  # letters of an adapter's name
_PROMPT = 160  # letters of a prompt that are shown


@dataclass(frozen=True, slots=True)
class AnswerView:
    """One answer as it is shown.

    Attributes:
        title: Where the prompt comes from, and its label.
        prompt: Text of the prompt.
        pieces: n readable tokens.
        first: Per token the number of the adapter with most weight, or None where several tie.
        shares: Per adapter its share of the weight.
    """

    title: str
    prompt: str
    pieces: tuple[str, ...]
    first: tuple[int | None, ...]
    shares: tuple[float, ...]


def legend(experts: Sequence[str], shares: Sequence[float], *, ties: bool = False) -> Text:
    """Adapters by their share, each with its color.

    Args:
        experts: Names.
        shares: Of all weight.
        ties: Some tokens have no color.
    """
    order = sorted(range(len(experts)), key=lambda number: -shares[number])
    colors = expert_colors(len(experts))
    shown = [number for number in order[:_MOST] if shares[number] > 0]
    parts = [_swatch(experts[number], shares[number], colors[number]) for number in shown]
    left = sum(share > 0 for share in shares) - len(shown)
    parts += [Text(f"and {left} more")] if left else []
    parts += [Text("(no color: several tie)", style="dim")] if ties else []
    return _lines(parts) if shown else Text("no adapter had any weight")


def _lines(parts: Sequence[Text]) -> Text:
    """Parts side by side, none of them broken."""
    shown, used = Text(), 0
    for part in parts:
        gap = "" if not used else "  " if used + len(part) + 2 <= _WIDTH else "\n"
        used = len(part) if gap in ("", "\n") else used + len(part) + 2
        shown.append(gap).append_text(part)
    return shown


def _swatch(name: str, share: float, color: str) -> Text:
    mark = Text(f" {_name(name)} ", style=f"{text_on(color)} on {color}")
    return mark.append(f" {words.percent(share)}", style="default on default")


def _name(adapter: str) -> str:
    return words.printable(words.cut(adapter, _NAME))


def answer(view: AnswerView, experts: Sequence[str]) -> Text:
    """Prompt, answer and shares, on lines of their own."""
    colors = expert_colors(len(experts))
    shown = Text(f"{words.printable(view.title)}\n", style="bold")
    prompt = words.printable(" ".join(view.prompt.split()))
    shown.append(f"{words.ending(prompt, _PROMPT)}\n", style="not bold dim")
    if not view.pieces:
        return shown.append("(no answer: the model ended at once)", style="not bold italic")
    for piece, number in zip(view.pieces, view.first, strict=True):
        color = None if number is None else colors[number]
        style = f"not bold {text_on(color)} on {color}" if color else "not bold"
        shown.append(words.printable(piece), style=style)
    if not shown.plain.endswith("\n"):
        shown.append("\n")
    shown.append_text(_shares(view, experts))
    return shown


def _shares(view: AnswerView, experts: Sequence[str]) -> Text:
    best = sorted(range(len(experts)), key=lambda number: -view.shares[number])[:3]
    named = [
        f"{_name(experts[n])} {words.percent(view.shares[n])}" for n in best if view.shares[n] > 0
    ]
    return Text(" · ".join(named), style="not bold italic dim")
