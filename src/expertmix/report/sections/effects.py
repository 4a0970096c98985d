"""What interventions do to the task: tables of interventions by labels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from expertmix.report import words
from expertmix.report.effect import Effect
from expertmix.report.markup import Html, join, tag
from expertmix.report.palette import DIVERGING
from expertmix.report.report import Report
from expertmix.report.section import CellStyle, Section, folded, grid, shade

_MEANING = {
    "ablate": "Ablate: the expert is chosen, but its output is dropped and nobody steps in.",
    "mask": "Mask: the expert may not be chosen, and the router picks another in its place.",
}


@dataclass(frozen=True)
class _Block:
    """Effects that share a table: one metric, one kind of intervention."""

    metric: str
    kind: str
    effects: tuple[Effect, ...]


def section(report: Report) -> Section | None:
    """A table of changes per metric and kind, and all numbers behind it."""
    if not report.effects:
        return None
    blocks = _blocks(report.effects)
    return Section(
        key="effects",
        title=f"What happens when an {report.expert} is taken away?",
        headline=headline(report),
        reading=(
            f"Being called often does not prove that an {report.expert} is needed; only running "
            "again "
            "without it does. Each row is an intervention, each column a kind of text, each number "
            "the change that it made. Brown is worse, blue is better, pale is no difference; "
            "each table has a color scale of its own."
        ),
        body=join([*(_table(block) for block in blocks), folded("All numbers", _numbers(blocks))]),
    )


def headline(report: Report) -> str:
    """The largest harm."""
    worst = max(
        report.effects, key=lambda effect: effect.harm if effect.harm == effect.harm else -1e9
    )
    if not worst.harm > 0:
        return "No intervention made anything worse."
    return (
        f"The largest harm: with “{worst.intervention}”, {worst.metric} on "
        f"{words.named(worst.label)} goes from {words.decimal(worst.base)} to "
        f"{words.decimal(worst.value)} ({words.signed(worst.delta)})."
    )


def _blocks(effects: Sequence[Effect]) -> list[_Block]:
    found: dict[tuple[str, str], list[Effect]] = {}
    for effect in effects:
        found.setdefault((effect.metric, effect.kind), []).append(effect)
    return [_Block(metric, kind, tuple(part)) for (metric, kind), part in found.items()]


def _table(block: _Block) -> Html:
    harms = [abs(effect.harm) for effect in block.effects if effect.harm == effect.harm]
    most = max(harms, default=0.0) or 1.0
    labels = _unique(effect.label for effect in block.effects)
    by_place = {(effect.intervention, effect.label): effect for effect in block.effects}
    rows = [
        (name, [_cell(by_place.get((name, label)), most) for label in labels])
        for name in _unique(effect.intervention for effect in block.effects)
    ]
    title = f"Change in {block.metric}" + (f": {block.kind}" if block.kind else "")
    meaning = _MEANING.get(block.kind.lower(), "")
    return join(
        [
            tag("h3", {}, title),
            tag("p", {"class": "reading"}, meaning) if meaning else Html(""),
            grid(f"{title}, by intervention and text", "intervention", labels, rows),
        ]
    )


def _cell(effect: Effect | None, most: float) -> CellStyle:
    if effect is None or effect.harm != effect.harm:
        return CellStyle(words.DASH)
    place = 0.5 + effect.harm / most / 2
    return shade(words.signed(effect.delta), DIVERGING, place, strong=effect.harm > most / 2)


def _numbers(blocks: Sequence[_Block]) -> Html:
    rows = [
        (
            effect.intervention,
            [
                CellStyle(effect.label),
                CellStyle(effect.metric),
                CellStyle(words.decimal(effect.base, 3)),
                CellStyle(words.decimal(effect.value, 3)),
                CellStyle(words.signed(effect.delta, 3)),
            ],
        )
        for block in blocks
        for effect in block.effects
    ]
    columns = ("text", "metric", "without", "with", "change")
    return grid(
        "Every effect: the metric without and with the intervention", "intervention", columns, rows
    )


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
