"""What a method did to a whole task: `Line`, its numbers, and what they show in words.

Every line is compared with the base on the same items: McNemar's exact test with Holm's correction
over the methods, a paired bootstrap of the change in loss. Controls and bounds (what needs the
label) are shown beside the methods and are not corrected: they are there to doubt a gain.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from expertmix.report import words
from expertmix.report.table import Table
from expertmix.study.bootstrap import Estimate
from expertmix.study.contestants import Kind
from expertmix.study.figures import number
from expertmix.study.optimize_rows import ItemRow
from expertmix.study.paired import Flips, flips, holm, mean_difference, wilson

LEVEL = 0.05
"""A p-value below it counts as shown."""


@dataclass(frozen=True, slots=True)
class Line:
    """One method over all items.

    Attributes:
        method: Its name.
        kind: What it stands for.
        items: How many.
        accuracy: Share of right items with Wilson's interval; nan where nothing is chosen.
        dense: The share with all experts that were used while optimizing.
        moved: Items by right and wrong, before and after.
        p: McNemar's, against the base.
        p_holm: Corrected over the methods; of methods only.
        loss: Mean choice loss in nats.
        change: Mean change of it against the base, with a paired bootstrap interval.
        changed: Items whose routing was changed in any of their orders.
        refused: Items that were left alone, by reason.
        gap: Share of the oracle's gain in right items that it reaches; nan without an oracle that
            gains.
        milliseconds: Per item, the base's pass included.
        relative: That over the base's own pass in the very same batches, since a machine's speed
            changes during a run; where that is not told apart, over the base's run.
    """

    method: str
    kind: Kind
    items: int
    accuracy: Estimate
    dense: float
    moved: Flips
    p: float
    p_holm: float
    loss: float
    change: Estimate
    changed: int
    refused: Mapping[str, int]
    gap: float
    milliseconds: float
    relative: float

    def figures(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "method": self.method,
            "kind": self.kind,
            "items": self.items,
            "accuracy": interval(self.accuracy),
            "accuracy_dense": number(self.dense),
            "wrong_to_right": self.moved.gained,
            "right_to_wrong": self.moved.lost,
            "right_in_both": self.moved.both,
            "wrong_in_both": self.moved.neither,
            "mcnemar_p": number(self.p, 6),
            "mcnemar_p_holm": number(self.p_holm, 6),
            "loss": number(self.loss),
            "loss_change": interval(self.change),
            "changed": self.changed,
            "refused": dict(self.refused),
            "oracle_gap_share": number(self.gap),
            "ms_per_item": number(self.milliseconds, 3),
            "relative_cost": number(self.relative, 3),
        }


def interval(found: Estimate) -> dict[str, float | None]:
    """An estimate, JSON-ready."""
    return {"value": number(found.value), "low": number(found.low), "high": number(found.high)}


def summary(rows: Sequence[ItemRow], *, seed: int = 0, oracle: str = "oracle") -> list[Line]:
    """One line per method, in order of appearance; the base's is there too.

    Args:
        rows: All of them; every method has the same items.
        seed: Of the bootstrap.
        oracle: Name of the method that bounds the gain.
    """
    groups: dict[str, list[ItemRow]] = {}
    for row in rows:
        groups.setdefault(row.method, []).append(row)
    groups = {name: sorted(own, key=lambda row: row.item) for name, own in groups.items()}
    tested = {
        name: _moved(own).p
        for name, own in groups.items()
        if own[0].kind == "method" and not own[0].free
    }
    corrected = holm(tested)
    base_ms = _milliseconds(groups.get("base", ()))
    gain = _gain(groups.get(oracle, ()))
    return [_line(own, corrected, base_ms, gain, seed) for own in groups.values()]


def _line(
    rows: Sequence[ItemRow], corrected: Mapping[str, float], base_ms: float, gain: float, seed: int
) -> Line:
    choice = not rows[0].free
    moved, spent, name = _moved(rows), _milliseconds(rows), rows[0].method
    right = moved.both + moved.gained
    return Line(
        method=name,
        kind=rows[0].kind,
        items=len(rows),
        accuracy=wilson(right, len(rows)) if choice else Estimate(math.nan),
        dense=sum(bool(row.dense_correct) for row in rows) / len(rows) if choice else math.nan,
        moved=moved,
        p=moved.p if choice and rows[0].kind != "base" else math.nan,
        p_holm=corrected.get(name, math.nan),
        loss=sum(row.loss for row in rows) / len(rows),
        change=mean_difference(
            [row.base_loss for row in rows], [row.loss for row in rows], seed=seed
        ),
        changed=sum(row.changed > 0 for row in rows),
        refused=_refused(rows),
        gap=_gain(rows) / gain if gain > 0 and rows[0].kind != "base" else math.nan,
        milliseconds=spent,
        relative=_relative(rows, spent, base_ms),
    )


def _moved(rows: Sequence[ItemRow]) -> Flips:
    return flips([bool(row.base_correct) for row in rows], [bool(row.correct) for row in rows])


def _gain(rows: Sequence[ItemRow]) -> float:
    """Right items more than the base, as a share of all."""
    moved = _moved(rows)
    return (moved.gained - moved.lost) / len(rows) if rows else math.nan


def _milliseconds(rows: Sequence[ItemRow]) -> float:
    return 1000 * sum(row.seconds for row in rows) / len(rows) if rows else math.nan


def _relative(rows: Sequence[ItemRow], spent: float, base_ms: float) -> float:
    read = 1000 * sum(row.stages.get("read", 0.0) for row in rows) / len(rows)
    over = read or base_ms
    return spent / over if over else math.nan


def _refused(rows: Sequence[ItemRow]) -> dict[str, int]:
    """Without the numbers behind the colon, which differ from item to item."""
    counts: dict[str, int] = {}
    for row in rows:
        for reason in {one.partition(":")[0] for one in row.refused if one}:
            counts[reason] = counts.get(reason, 0) + 1
    return counts


def summary_tables(lines: Sequence[Line], said: Sequence[str]) -> tuple[Table, ...]:
    """For the terminal and the page: right answers, where there is a choice; then loss and cost."""
    loss = _loss_table(lines, "" if _chooses(lines) else " ".join(said))
    return (_answer_table(lines, " ".join(said)), loss) if _chooses(lines) else (loss,)


def _chooses(lines: Sequence[Line]) -> bool:
    return not math.isnan(lines[0].accuracy.value)


def _answer_table(lines: Sequence[Line], headline: str) -> Table:
    return Table(
        title="Right answers",
        columns=("routing", "right %", "95 %", "+/-", "p", "Holm"),
        rows=tuple(
            (
                line.method,
                f"{100 * line.accuracy.value:.1f}",
                f"{100 * line.accuracy.low:.0f} to {100 * line.accuracy.high:.0f}",
                None if line.kind == "base" else f"+{line.moved.gained} -{line.moved.lost}",
                _known(line.p),
                _known(line.p_holm),
            )
            for line in lines
        ),
        note="+: wrong under the base's routing and right under this one; -: the other way round. "
        "p: McNemar's exact test against the base. Holm: p, corrected for the number of methods.",
        headline=headline,
    )


def _loss_table(lines: Sequence[Line], headline: str) -> Table:
    return Table(
        title="Loss and cost",
        columns=("routing", "loss", "change", "95 %", "of oracle", "cost"),
        rows=tuple(
            (
                line.method,
                line.loss,
                None if line.kind == "base" else words.signed(line.change.value, 3),
                None if line.kind == "base" else _span(line.change),
                None if math.isnan(line.gap) else words.percent(line.gap),
                _known(line.relative),
            )
            for line in lines
        ),
        note="Loss of the choice among the options, in nats (of a text with one answer: minus its "
        "score); lower is better. of oracle: share of the oracle's gain in right answers. cost: "
        "time per item over the base's, that pass included, and what a method learns once too.",
        headline=headline,
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
            said += [_against_base(line), *_against_controls(rows, lines, line)]
    return [*said, *_steerable(lines)]


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


def _against_controls(rows: Sequence[ItemRow], lines: Sequence[Line], line: Line) -> list[str]:
    return [
        f"It is not shown to be better than {one.control} ({one.moved.gained} against "
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
    mine = {row.item: row for row in rows if row.method == line.method}
    if line.p_holm >= LEVEL or math.isnan(line.p_holm) or line.moved.gained <= line.moved.lost:
        return []
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
