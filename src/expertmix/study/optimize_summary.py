"""What a method did to a whole task: `Line`, its numbers.

Every line is compared with the base on the same items: McNemar's exact test with Holm's correction
over the methods, a paired bootstrap of the change in loss. Controls and bounds (what needs the
label) are shown beside the methods and are not corrected: they are there to doubt a gain.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from expertmix.core.estimate import Estimate
from expertmix.report.remix_data import LEVEL
from expertmix.study.contestants import Kind
from expertmix.study.figures import number
from expertmix.study.optimize_rows import ItemRow
from expertmix.study.paired import Flips, flips, holm, mean_difference, wilson


@dataclass(frozen=True, slots=True)
class Line:
    """One method over all items.

    Attributes:
        method: Its name.
        kind: What it stands for.
        items: How many.
        accuracy: Share of right items with Wilson's interval; nan where nothing is chosen.
        dense: The share with all experts that were used while optimizing; nan where none were.
        moved: Items by right and wrong, before and after.
        p: McNemar's, against the base.
        p_holm: Corrected over the methods; of methods only.
        loss: Mean choice loss in nats, over the items where it and the base's are finite.
        change: Mean change of it against the base, with a paired bootstrap interval.
        changed: Items whose routing was changed in any of their orders.
        refused: Items that were left alone, by reason.
        gap: Share of the oracle's gain in right items that it reaches; nan without an oracle that
            gains.
        milliseconds: Per item, the base's pass included: it is done once for all methods, and is
            in the time of each.
        relative: That over the base's pass.
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

    @property
    def helps(self) -> bool:
        """A method that is shown to get more items right than the base."""
        return self.p_holm < LEVEL and self.moved.gained > self.moved.lost

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
    gain = _gain(groups.get(oracle, ()))
    return [_line(own, corrected, gain, seed) for own in groups.values()]


def _line(rows: Sequence[ItemRow], corrected: Mapping[str, float], gain: float, seed: int) -> Line:
    choice = not rows[0].free
    moved, name = _moved(rows), rows[0].method
    spent, read = (1000 * sum(times) / len(rows) for times in (
        [row.seconds for row in rows], [row.stages.get("read", 0.0) for row in rows]
    ))  # fmt: skip
    right = moved.both + moved.gained
    known = [row for row in rows if math.isfinite(row.loss) and math.isfinite(row.base_loss)]
    before, after = [row.base_loss for row in known], [row.loss for row in known]
    return Line(
        method=name,
        kind=rows[0].kind,
        items=len(rows),
        accuracy=wilson(right, len(rows)) if choice else Estimate(math.nan),
        dense=_dense(rows),
        moved=moved,
        p=moved.p if choice and rows[0].kind != "base" else math.nan,
        p_holm=corrected.get(name, math.nan),
        loss=sum(after) / len(after) if after else math.nan,
        change=mean_difference(before, after, seed=seed),
        changed=sum(row.changed > 0 for row in rows),
        refused=_refused(rows),
        gap=_gain(rows) / gain if gain > 0 and rows[0].kind != "base" else math.nan,
        milliseconds=spent,
        relative=spent / read if read else math.nan,
    )


def _moved(rows: Sequence[ItemRow]) -> Flips:
    return flips([bool(row.base_correct) for row in rows], [bool(row.correct) for row in rows])


def _gain(rows: Sequence[ItemRow]) -> float:
    """Right items more than the base, as a share of all."""
    moved = _moved(rows)
    return (moved.gained - moved.lost) / len(rows) if rows else math.nan


def _dense(rows: Sequence[ItemRow]) -> float:
    """Share of right items; nan where nothing is chosen, or nothing was optimized."""
    if rows[0].free or not any(row.dense for row in rows):
        return math.nan
    return sum(bool(row.dense_correct) for row in rows) / len(rows)


def _refused(rows: Sequence[ItemRow]) -> dict[str, int]:
    """Without the numbers behind the colon, which differ from item to item."""
    counts: dict[str, int] = {}
    for row in rows:
        for reason in {one.partition(":")[0] for one in row.refused if one}:
            counts[reason] = counts.get(reason, 0) + 1
    return counts
