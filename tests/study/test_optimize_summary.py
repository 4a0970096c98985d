from __future__ import annotations

import math

import pytest

from expertmix.report.terminal import data_table
from expertmix.study.optimize_summary import summary
from expertmix.study.optimize_verdict import summary_tables, verdict
from expertmix.study.paired import mcnemar

from .test_optimize_rows import row

RIGHT, WRONG = [-2.0, -1.0, -3.0], [-1.0, -2.0, -3.0]


def run(method: str, answers: str, kind: str = "method", base: str = "0011", **changes):
    """Rows of a method: 1 where it is right."""
    scores = {"0": WRONG, "1": RIGHT}
    return [
        row(n, method, kind, base=scores[b], scores=scores[a], **changes)
        for n, (a, b) in enumerate(zip(answers, base, strict=True))
    ]


def test_a_line_counts_its_items():
    """Accuracy, flips both ways, McNemar, loss and its change, cost over the base's."""
    read = {"stages": {"read": 0.01}}
    rows = [*run("base", "0011", "base", **read), *run("ngd", "1101", seconds=0.03, **read)]
    base, ngd = summary(rows)
    assert (base.accuracy.value, ngd.accuracy.value) == (0.5, 0.75)
    assert (ngd.moved.gained, ngd.moved.lost) == (2, 1)
    assert ngd.p == ngd.p_holm == mcnemar(2, 1)
    assert math.isnan(base.p)
    assert base.change.value == 0
    assert ngd.change.value == pytest.approx(ngd.loss - base.loss)
    assert (ngd.relative, ngd.milliseconds) == (pytest.approx(3), pytest.approx(30))


def test_holm_counts_the_methods_and_not_the_controls():
    """A control is there to doubt a gain, so it costs no power."""
    many = "0" * 12
    rows = [
        *run("base", many, "base", many), *run("ngd", "1" * 12, base=many),
        *run("kernel_regression", "1" * 11 + "0", base=many),
        *run("random", "1" * 12, "control", many),
    ]  # fmt: skip
    _, ngd, regression, random = summary(rows)
    assert ngd.p_holm == pytest.approx(2 * ngd.p)
    assert regression.p_holm == pytest.approx(max(2 * ngd.p, regression.p))
    assert math.isnan(random.p_holm)
    assert random.p == ngd.p


def test_the_oracle_bounds_the_gain():
    """Share of its gain in right items; no share where it gains nothing."""
    rows = [
        *run("base", "0011", "base"), *run("ngd", "1011"), *run("oracle", "1111", "bound"),
    ]  # fmt: skip
    assert [line.gap for line in summary(rows)][1:] == [0.5, 1.0]
    without = summary([*run("base", "0011", "base"), *run("ngd", "1011")])
    assert math.isnan(without[1].gap)
    assert without[1].figures()["oracle_gap_share"] is None


def test_nothing_shown_is_said():
    """No flip, too few flips, and a gain that its controls share."""
    base = run("base", "0011", "base")
    for answers, said in (("0011", "changes no answer"), ("1011", "nothing is shown (1 gained")):
        rows = [*base, *run("ngd", answers)]
        assert said in " ".join(verdict(rows, summary(rows)))
    many = "0" * 12
    gain = [*run("base", many, "base", many), *run("ngd", "1" * 12, base=many)]
    assert "is right more often" in verdict(gain, summary(gain))[0]
    shared = [*gain, *run("ngd, random neighbors", "1" * 11 + "0", "control", many)]
    said = " ".join(verdict(shared, summary(shared)))
    assert "not shown to be better than ngd, random neighbors (1 against 0, p = 1)" in said


def test_what_is_lost_is_said():
    """A clear loss is no gain."""
    many = "1" * 12
    rows = [*run("base", many, "base", many), *run("ngd", "0" * 12, base=many)]
    assert "is right fewer often" not in verdict(rows, summary(rows))[0]
    assert "is right less often" in verdict(rows, summary(rows))[0]


def test_free_texts_have_a_loss_only():
    """No accuracy, no McNemar; the words are about the loss."""
    shared = {"free": True, "gold": 0}
    rows = [
        *(row(n, "base", "base", base=[-2.0], scores=[-2.0], **shared) for n in range(5)),
        *(row(n, base=[-2.0], scores=[-1.0], **shared) for n in range(5)),
    ]
    lines = summary(rows)
    assert math.isnan(lines[1].accuracy.value)
    assert lines[1].change.value == pytest.approx(-1)
    assert verdict(rows, lines) == ["ngd lowers the loss by 1.000 nats."]
    assert [table.title for table in summary_tables(lines)] == ["Loss and cost"]


def test_refusals_are_counted_by_reason():
    """An item counts once, whatever number of orders it was asked in."""
    rows = [*run("base", "0011", "base"), *run("ngd", "0011", refused=["too far", "too far"])]
    assert summary(rows)[1].refused == {"too far": 4}


def test_the_tables_are_shown():
    """A row per method; a dash where there is no number."""
    rows = [*run("base", "0011", "base"), *run("ngd", "1101", seconds=0.03)]
    tables = summary_tables(summary(rows))
    assert [table.title for table in tables] == ["Right answers", "Loss and cost"]
    for table in tables:
        assert [cells[0] for cells in table.rows] == ["base", "ngd"]
        assert data_table(table).row_count == 2


def test_steering_is_told_apart_from_misrouting():
    """Where a wrong answer can be pushed as well, and where it is not shown that it can."""
    many = "1" * 12
    for answers, said in (("0" * 12, "can be steered"), ("1" * 12, "may be chance")):
        rows = [*run("base", many, "base", many), *run("wrong_oracle", answers, "bound", many)]
        assert said in verdict(rows, summary(rows))[-1]


def test_items_that_were_left_alone_are_told():
    """How many, and why: a fall-back to the base is not silent."""
    rows = [*run("base", "0011", "base"), *run("ngd", "0011", refused=["too far: 3 > 2"])]
    said = " ".join(verdict(rows, summary(rows)))
    assert "ngd left the routing of 4 of 4 items alone: too far (4)." in said


def test_a_gain_without_controls_is_doubted():
    """It may be due to anything."""
    many = "0" * 12
    rows = [*run("base", many, "base", many), *run("ngd", "1" * 12, base=many)]
    assert "No control was run" in " ".join(verdict(rows, summary(rows)))
    rows += run("neighbor vote", many, "control", many)
    assert "No control was run" not in " ".join(verdict(rows, summary(rows)))


def test_what_has_no_dense_result_shows_none():
    """The base, a vote, or a method that changed nothing."""
    rows = [*run("base", "0011", "base"), *run("ngd", "1111", dense=RIGHT)]
    base, ngd = summary(rows)
    assert base.figures()["accuracy_dense"] is None
    assert ngd.dense == 1


def test_what_cannot_be_read_spoils_no_loss():
    """It counts as wrong, also where the first option is right; losses are of the others."""
    broken = {"base": [math.nan] * 3, "scores": [math.nan] * 3, "gold": 0}
    rows = [
        *run("base", "0011", "base"), row(4, "base", "base", **broken),
        *run("ngd", "1111"), row(4, "ngd", **broken),
    ]  # fmt: skip
    base, ngd = summary(rows)
    whole = summary([one for one in rows if one.item != 4])
    assert (base.accuracy.value, ngd.accuracy.value) == (0.4, 0.8)
    assert (base.loss, ngd.loss) == (whole[0].loss, whole[1].loss)
    assert ngd.change == whole[1].change
    assert "1 item of 5 cannot be read: scores are not finite" in verdict(rows, [base, ngd])[-1]
