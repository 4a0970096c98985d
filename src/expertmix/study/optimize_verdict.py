"""What the numbers of a run show, in tables and in words: `summary_tables`, `verdict`.

Words are sparing: without a p-value below the level nothing is shown, and a gain is doubted where a
control has it too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from expertmix.core.estimate import Estimate
from expertmix.report import remix_words, words
from expertmix.report.remix_data import LEVEL
from expertmix.report.table import Table
from expertmix.study.optimize_rows import ItemRow
from expertmix.study.optimize_summary import Line
from expertmix.study.paired import Flips, flips


def summary_tables(lines: Sequence[Line]) -> tuple[Table, ...]:
    """For the terminal: right answers, where there is a choice; then loss and cost."""
    loss = _loss_table(lines)
    return (loss,) if math.isnan(lines[0].accuracy.value) else (_answer_table(lines), loss)


def _answer_table(lines: Sequence[Line]) -> Table:
    return Table(
        title="Right answers",
        columns=("routing", "right %", "95 %", "+/-", "p", "Holm"),
        rows=tuple(
            (
                line.method,
                f"{100 * line.accuracy.value:.1f}",
                f"{100 * line.accuracy.low:.0f} to {100 * line.accuracy.high:.0f}",
                None if line.kind == "base" else f"+{line.moved.gained} -{line.moved.lost}",
                remix_words.p_value(line.p),
                remix_words.p_value(line.p_holm),
            )
            for line in lines
        ),
        note="+: wrong under the base's routing and right under this one; -: the other way round. "
        "p: McNemar's exact test against the base. Holm: p, corrected for the number of methods.",
    )


def _loss_table(lines: Sequence[Line]) -> Table:
    return Table(
        title="Loss and cost",
        columns=("routing", "loss", "change", "95 %", "of oracle", "cost"),
        rows=tuple(
            (
                line.method,
                line.loss,
                None if line.kind == "base" else words.signed(line.change.value, 3),
                None if line.kind == "base" else _span(line.change),
                remix_words.share(line.gap, 0),
                _known(line.relative),
            )
            for line in lines
        ),
        note="loss: of the choice among the options, in nats (of a text with one answer: minus its "
        "score); lower is better. of oracle: share of the oracle's gain in right answers. cost: "
        "time per item, the base's pass included, over that pass.",
    )


def _span(found: Estimate) -> str | None:
    if math.isnan(found.low):
        return None
    return f"{words.signed(found.low, 3)}, {words.signed(found.high, 3)}"


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def verdict(rows: Sequence[ItemRow], lines: Sequence[Line]) -> list[str]:
    """What the numbers show, sentence by sentence, and where they show nothing."""
    said = []
    for line in lines:
        if line.kind == "method":
            said += [_against_base(line), *_left_alone(line), *_against_controls(rows, lines, line)]
    return [*said, *_steerable(lines), *_unread(rows)]


def _unread(rows: Sequence[ItemRow]) -> list[str]:
    """Items on which the model itself fails."""
    own = [row for row in rows if row.method == rows[0].method]
    failed = sum(not math.isfinite(row.base_loss) for row in own)
    if not failed:
        return []
    counted = words.counted(failed, "item")
    return [f"{counted} of {len(own)} cannot be read: scores are not finite. No loss counts them."]


def _against_base(line: Line) -> str:
    moved, name = line.moved, line.method
    if math.isnan(line.accuracy.value):
        if not line.change.clear:
            return f"{name}: nothing is shown, the change in loss may be chance."
        way = "lowers" if line.change.value < 0 else "raises"
        return f"{name} {way} the loss by {abs(line.change.value):.3f} nats."
    if not moved.gained and not moved.lost:
        return f"{name} changes no answer."
    counts = f"{moved.gained} gained, {moved.lost} lost, p = {line.p_holm:.3g}"
    if line.p_holm >= LEVEL:
        return f"{name}: nothing is shown ({counts}): the difference to the base may be chance."
    better = "more" if moved.gained > moved.lost else "less"
    return f"{name} is right {better} often than the base ({counts})."


def _left_alone(line: Line) -> list[str]:
    """Items with the base's routing, and why."""
    if not line.refused:
        return []
    why = words.listed([f"{reason} ({count})" for reason, count in line.refused.items()])
    alone = f"{line.items - line.changed} of {words.counted(line.items, 'item')}"
    return [f"{line.method} left the routing of {alone} alone: {why}."]


def _against_controls(rows: Sequence[ItemRow], lines: Sequence[Line], line: Line) -> list[str]:
    if line.helps and not any(one.kind == "control" for one in lines):
        return ["No control was run: the gain need not come from what similar items teach."]
    return [
        f"{line.method} is not shown to be better than {one.control} ({one.moved.gained} against "
        f"{one.moved.lost}, p = {one.moved.p:.3g})."
        for one in unbeaten(rows, lines, line)
    ]


@dataclass(frozen=True, slots=True)
class Unbeaten:
    """A control that a method is not shown to be better than.

    Attributes:
        control: Its name.
        moved: Items by right and wrong, under the control and under the method.
    """

    control: str
    moved: Flips


def unbeaten(rows: Sequence[ItemRow], lines: Sequence[Line], line: Line) -> list[Unbeaten]:
    """Controls on the same items: a gain that they share is not due to the neighbors.

    Args:
        rows: All of them.
        lines: All of them.
        line: The method's; one that is not shown to help has nothing to be doubted.
    """
    if not line.helps:
        return []
    mine = {row.item: row for row in rows if row.method == line.method}
    found = []
    for control in lines:
        if control.kind == "control":
            own = [row for row in rows if row.method == control.method]
            moved = flips([bool(r.correct) for r in own], [bool(mine[r.item].correct) for r in own])
            if moved.p >= LEVEL or moved.gained <= moved.lost:
                found.append(Unbeaten(control.method, moved))
    return found


def _steerable(lines: Sequence[Line]) -> list[str]:
    """What the wrong-label oracle says of the oracle's gain."""
    wrong = next((line for line in lines if line.method == "wrong_oracle"), None)
    if wrong is None or math.isnan(wrong.accuracy.value):
        return []
    lost, right = wrong.moved.lost, wrong.moved.lost + wrong.moved.both
    if wrong.p >= LEVEL or lost <= wrong.moved.gained:
        return [
            f"Pushed toward a wrong answer, {lost} of {right} right ones fall, which may be chance."
        ]
    return [
        f"Pushed toward a wrong answer, {lost} of {right} right ones fall: what an oracle gains is "
        f"also that answers can be steered, and not only that they were misrouted."
    ]
