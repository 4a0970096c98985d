from __future__ import annotations

import json
import math

import pyarrow.parquet as pq
import pytest

from expertmix.study.choice_prompts import Style, ask
from expertmix.study.contestants import Contestant
from expertmix.study.optimize_rows import ItemRow, best, choice_loss, item_rows, write_rows
from expertmix.study.optimize_runs import Scored
from expertmix.testing import tiny_tokenizer

from .choosing import item


def row(number: int = 0, method: str = "ngd", kind: str = "method", **changes) -> ItemRow:
    """One item with three options, the second of which is right."""
    fields = {
        "item": number, "name": f"item-{number}", "where": f"t.jsonl:{number}", "label": None,
        "method": method, "kind": kind, "gold": 1, "free": False, "base": [-1.0, -2.0, -3.0],
        "scores": [-2.0, -1.0, -3.0], "seconds": 0.01,
    }  # fmt: skip
    return ItemRow(**{**fields, **changes})


def test_right_is_what_has_the_best_score():
    """The first of equal ones; a score that is not a number never wins; free texts are neither."""
    assert (row().correct, row().base_correct, row().dense_correct) == (True, False, True)
    assert row(dense=[0.0, -1.0, -2.0]).dense_correct is False
    assert best([math.nan, -1.0, -1.0]) == 1
    assert best([math.nan, math.nan]) == 0
    assert row(free=True, gold=0, scores=[-4.0]).correct is None


def test_choice_loss_is_that_of_a_softmax():
    """Over the options; far scores neither overflow nor vanish; of one answer, minus its score."""
    scores = [-1.0, -2.5, -0.5]
    expected = -math.log(math.exp(-2.5) / sum(math.exp(one) for one in scores))
    assert choice_loss(scores, 1) == pytest.approx(expected)
    assert choice_loss([-3000.0, -3001.0], 0) == pytest.approx(math.log(1 + math.exp(-1)))
    assert choice_loss([-4.0], 0) == 4.0


def test_the_table_has_a_row_per_item_and_method(tmp_path):
    """With what is derived of scores, and notes as JSON."""
    rows = [row(), row(1, notes={"alpha": [0.5]})]
    write_rows(tmp_path / "results.parquet", rows)
    found = pq.read_table(tmp_path / "results.parquet").to_pylist()
    assert "prompt" not in found[0]
    assert [one["item"] for one in found] == [0, 1]
    assert found[0]["correct"] is True
    assert found[0]["base_correct"] is False
    assert found[0]["base_scores"] == [-1.0, -2.0, -3.0]
    assert json.loads(found[1]["notes"]) == {"alpha": [0.5]}


def test_texts_are_there_only_when_they_are_given(tmp_path):
    """Prompt and options of each row's item."""
    texts = [("Q0", ["a", "b", "c"]), ("Q1", ["d", "e", "f"])]
    write_rows(tmp_path / "r.parquet", [row(1), row(0)], texts)
    found = pq.read_table(tmp_path / "r.parquet").to_pylist()
    assert [(one["prompt"], one["options"]) for one in found] == [texts[1], texts[0]]


def test_an_item_gathers_its_orders():
    """Scores come back in its own order, as means; what happened in each order stays apart."""
    first = item(1, gold=1)
    asked = ask([first], tiny_tokenizer(), Style("letters"))
    known, better = [-1.0, -2.0, -3.0], [-2.0, -1.0, -3.0]
    found = {
        number: Scored(
            number=number, base=[known[n] for n in one.order],
            scores=[better[n] for n in one.order], changed=number > 0, notes={"alpha": number},
            refused="" if number else "too far", neighbors=["r"], weights=[1.0], seconds=1.0,
        )
        for number, one in enumerate(asked)
    }  # fmt: skip
    (row,) = item_rows(Contestant("ngd", "method"), [first], asked, found)
    assert (row.base, row.scores, row.dense) == (known, better, [])
    assert (row.changed, row.refused) == (2, ["too far", "", ""])
    assert (row.notes, row.seconds) == ({"alpha": [0, 1, 2]}, 3.0)
    assert (row.base_correct, row.correct) == (False, True)


def test_scores_of_a_ledger_read_back_as_they_were():
    """Through JSON, bit for bit."""
    one = Scored(number=3, base=[0.1 + 0.2], scores=[-1.0], losses=[1.0, 0.5], notes={"kl": 0.1})
    assert Scored.from_dict(json.loads(json.dumps({"of": "ngd", **one.to_dict()}))) == one
