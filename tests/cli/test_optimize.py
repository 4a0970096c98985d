from __future__ import annotations

import json

import pytest
from study.choosing import lines, questions
from study.conftest import everything


@pytest.fixture
def task(tmp_path):
    return lines(tmp_path / "task.jsonl", questions(4))


@pytest.fixture
def known(tmp_path):
    return lines(tmp_path / "known.jsonl", questions(12, start=30))


def _optimize(expertmix, moe, task, known, *more: object):
    return expertmix(
        "optimize", moe, "--task", task, "--reference", known, "--set", "steps=1",
        "--layers", "last 2", "--device", "cpu", *more,
    )  # fmt: skip


def test_methods_are_compared_on_the_screen(expertmix, moe, task, known, tmp_path):
    """Two tables, what they show in words, and what was written; nothing on stderr."""
    answer = _optimize(expertmix, moe, task, known, "--limit", 3, "--out", tmp_path / "out")
    assert (answer.code, answer.err) == (0, "")
    for text in ("Right answers", "Loss and cost", "ngd steps=1", "of 12 were answered right"):
        assert text in answer.out
    for name in ("results.parquet", "results.json"):
        assert f"wrote {tmp_path / 'out' / name}" in answer.out.replace("\n", "")


def test_json_is_all_there_is_on_stdout(expertmix, moe, task, known, tmp_path):
    """The content of results.json."""
    answer = _optimize(
        expertmix, moe, task, known, "--no-controls", "--json", "--out", tmp_path / "out"
    )
    assert (answer.code, answer.err) == (0, "")
    assert json.loads(answer.out) == json.loads((tmp_path / "out" / "results.json").read_text())


def test_a_dry_run_writes_nothing(expertmix, moe, task, known, tmp_path):
    """It says what would be done, and what is left out."""
    task.write_text(task.read_text() + task.read_text().splitlines()[0])
    before = everything(tmp_path)
    answer = _optimize(expertmix, moe, task, known, "--dry-run", "--out", tmp_path / "out")
    assert (answer.code, answer.err) == (0, "")
    for text in (
        "1 question left out: task.jsonl:5: the same item as task.jsonl:1",
        "4 questions, asked 4 times",
        "12 solved questions",
        "ngd steps=1, random neighbors",
        "would write results.parquet, results.json",
    ):
        assert text in answer.out.replace("\n", " ")
    assert everything(tmp_path) == before


@pytest.mark.parametrize(
    "more",
    [
        ("--method", "ndg"),
        ("--layers", "9"),
        ("--gate", "margin=1"),
        ("--neighbors", "kernel=wide"),
        ("--against", "ngd steps=1"),
        ("--style", "words"),
        ("--task", "nowhere.jsonl"),
    ],
)
def test_bad_input_is_one_clean_line(expertmix, moe, task, known, more):
    """Exit code 2, nothing on stdout."""
    answer = _optimize(expertmix, moe, task, known, *more)
    assert answer.code == 2
    assert answer.out == ""
    assert answer.err
