"""What one contestant did with one item: `ItemRow`, a row of `results.parquet`.

All lists over options are in the item's own order, averaged over the orders in which it was asked;
lists over orders are in the order in which it was asked. Knows no model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from expertmix.core.partial import output_errors
from expertmix.study.choice import Item
from expertmix.study.choice_prompts import Asked, item_scores
from expertmix.study.contestants import Contestant, Kind
from expertmix.study.optimize_runs import Scored


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemRow:
    """One item under one method.

    Attributes:
        item: Number of the item in the task.
        name: Its name.
        where: Its file and line.
        label: Its group.
        method: Name of the method; `base` for the model as it is.
        kind: What the method stands for.
        gold: Number of the right option.
        free: A text with its one answer: there is no choice.
        base: Scores of the options under the base's routing, in the units of the style.
        scores: Scores under the routing that the router's own top K allows.
        dense: Scores with all experts that were used while optimizing; empty where that is `scores`
            or there is none.
        neighbors: Per order, names of the references.
        weights: Per order, their kernel weights.
        similarity: Per order, their similarity.
        losses: Per order, the surrogate before the first step and after each.
        changed: In how many orders the routing was changed.
        refused: Why it was left alone, where it was: one reason per order, empty if changed.
        notes: More by name, such as α: a value per order.
        seconds: Its share of the time of its batches, the base's pass included, in all orders.
        stages: That time by stage; `read` is the plain pass, which is in all of them.
        dropped: Per order, near-duplicates among the references that were left out.
        moved: Per order, how the pathway moved, see `optimize_moves.moved`.
    """

    item: int
    name: str
    where: str
    label: str | None
    method: str
    kind: Kind
    gold: int
    free: bool
    base: list[float]
    scores: list[float]
    dense: list[float] = field(default_factory=list)
    neighbors: list[list[str]] = field(default_factory=list)
    weights: list[list[float]] = field(default_factory=list)
    similarity: list[list[float]] = field(default_factory=list)
    losses: list[list[float]] = field(default_factory=list)
    changed: int = 0
    refused: list[str] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    stages: dict[str, float] = field(default_factory=dict, compare=False)
    dropped: list[int] = field(default_factory=list)
    moved: list[dict[str, Any] | None] = field(default_factory=list)

    @property
    def correct(self) -> bool | None:
        """Whether the right option has the best score; None where there is no choice."""
        return None if self.free else is_right(self.scores, self.gold)

    @property
    def base_correct(self) -> bool | None:
        """The same of the base."""
        return None if self.free else is_right(self.base, self.gold)

    @property
    def dense_correct(self) -> bool | None:
        """The same with all experts that were used while optimizing."""
        return None if self.free else is_right(self.dense or self.scores, self.gold)

    @property
    def loss(self) -> float:
        """Choice loss; see `choice_loss`."""
        return choice_loss(self.scores, self.gold)

    @property
    def base_loss(self) -> float:
        """The same of the base."""
        return choice_loss(self.base, self.gold)

    @property
    def dense_loss(self) -> float:
        """The same with all experts that were used while optimizing."""
        return choice_loss(self.dense or self.scores, self.gold)


def item_rows(
    contestant: Contestant,
    items: Sequence[Item],
    asked: Sequence[Asked],
    found: Mapping[int, Scored],
) -> list[ItemRow]:
    """What a contestant did with all questions, as one row per item.

    Args:
        contestant: Who.
        items: All items.
        asked: All questions, the orders of an item one after the other.
        found: By number of the question.
    """
    mine = [found[number] for number in range(len(asked))]
    base, now, dense = (
        item_scores(asked, shown)
        for shown in (
            [one.base for one in mine],
            [one.scores for one in mine],
            [one.dense or one.scores for one in mine],
        )
    )
    orders: dict[int, list[Scored]] = {}
    for question, one in zip(asked, mine, strict=True):
        orders.setdefault(question.item, []).append(one)
    return [
        _row(contestant, item, orders[number], number, base[number], now[number], dense[number])
        for number, item in enumerate(items)
    ]


def _row(
    contestant: Contestant,
    item: Item,
    orders: Sequence[Scored],
    number: int,
    base: list[float],
    now: list[float],
    dense: list[float],
) -> ItemRow:
    return ItemRow(
        item=number, name=item.name, where=item.where, label=item.label,
        method=contestant.name, kind=contestant.kind, gold=item.gold, free=item.free, base=base,
        scores=now, dense=dense if any(one.dense for one in orders) else [],
        neighbors=[one.neighbors for one in orders], weights=[one.weights for one in orders],
        similarity=[one.similarity for one in orders], losses=[one.losses for one in orders],
        changed=sum(one.changed for one in orders), refused=[one.refused for one in orders],
        notes=_notes(orders), seconds=sum(one.seconds for one in orders), stages=_stages(orders),
        dropped=[one.dropped for one in orders], moved=[one.moved for one in orders],
    )  # fmt: skip


def _notes(orders: Sequence[Scored]) -> dict[str, Any]:
    names = dict.fromkeys(name for one in orders for name in one.notes)
    return {name: [one.notes.get(name) for one in orders] for name in names}


def _stages(orders: Sequence[Scored]) -> dict[str, float]:
    names = dict.fromkeys(name for one in orders for name in one.stages)
    return {name: sum(one.stages.get(name, 0.0) for one in orders) for name in names}


def best(scores: Sequence[float]) -> int:
    """Number of the best score; the first of several, and never one that is not a number."""
    return max(
        range(len(scores)), key=lambda n: (scores[n] if scores[n] == scores[n] else -math.inf, -n)
    )


def is_right(scores: Sequence[float], gold: int) -> bool:
    """Whether the right option has the best score, and that is a number."""
    return best(scores) == gold and not math.isnan(scores[gold])


def choice_loss(scores: Sequence[float], gold: int) -> float:
    """−log of the softmax over the options' scores at the right one, in nats.

    Of a text with its one answer, minus its score.
    """
    if len(scores) == 1:
        return -scores[0]
    top = max(scores)
    return top + math.log(sum(math.exp(score - top) for score in scores)) - scores[gold]


_LISTS = pa.list_(pa.list_(pa.float64()))
SCHEMA = pa.schema(
    [
        ("item", pa.int32()), ("name", pa.string()), ("where", pa.string()),
        ("label", pa.string()), ("method", pa.string()), ("kind", pa.string()),
        ("gold", pa.int32()), ("correct", pa.bool_()), ("base_correct", pa.bool_()),
        ("dense_correct", pa.bool_()), ("loss", pa.float64()), ("base_loss", pa.float64()),
        ("dense_loss", pa.float64()), ("scores", pa.list_(pa.float64())),
        ("base_scores", pa.list_(pa.float64())), ("dense_scores", pa.list_(pa.float64())),
        ("neighbors", pa.list_(pa.list_(pa.string()))), ("weights", _LISTS),
        ("similarity", _LISTS), ("dropped", pa.list_(pa.int32())), ("losses", _LISTS),
        ("changed", pa.int32()),
        ("refused", pa.list_(pa.string())), ("notes", pa.string()), ("seconds", pa.float64()),
        ("stages", pa.string()),
    ]
)  # fmt: skip
"""Columns of `results.parquet`; `notes` and `stages`, the seconds by stage, are JSON."""


Texts = Sequence[tuple[str, list[str]]]
"""Per item, its prompt and its options."""


def write_rows(path: Path, rows: Sequence[ItemRow], texts: Texts | None = None) -> None:
    """Write `results.parquet`.

    Args:
        path: The file.
        rows: What it holds.
        texts: Of the items; without them the file holds no text but names.

    Raises:
        OutputError: The disk is full, or the like.
    """
    table = pa.Table.from_pylist([_columns(row) for row in rows], schema=SCHEMA)
    if texts is not None:
        prompts = pa.array([texts[row.item][0] for row in rows], pa.string())
        options = pa.array([texts[row.item][1] for row in rows], pa.list_(pa.string()))
        table = table.append_column("prompt", prompts).append_column("options", options)
    with output_errors(path):
        pq.write_table(table, path, compression="zstd")


def _columns(row: ItemRow) -> dict[str, Any]:
    found = asdict(row)
    for name in ("correct", "base_correct", "dense_correct", "loss", "base_loss", "dense_loss"):
        found[name] = getattr(row, name)
    found["base_scores"], found["dense_scores"] = found.pop("base"), found.pop("dense")
    found["notes"], found["stages"] = json.dumps(row.notes), json.dumps(row.stages)
    del found["free"]
    return found
