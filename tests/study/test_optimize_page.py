"""Laws of the page of a run of `optimize`."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from expertmix.report.remix_report import RemixReport
from expertmix.study import optimize_job
from expertmix.study.optimize_job import run_optimize
from expertmix.study.optimize_page import optimize_page
from expertmix.study.optimize_plan import OptimizeJob, plan_optimize

from .choosing import lines, questions


@pytest.fixture(scope="module")
def job(moe, tmp_path_factory) -> OptimizeJob:
    """Two methods with all controls."""
    folder = tmp_path_factory.mktemp("optimize")
    return OptimizeJob(
        model=str(moe), task=str(lines(folder / "task.jsonl", questions(8))),
        reference=str(lines(folder / "known.jsonl", questions(20, start=30))), device="cpu",
        method="ngd steps=2", against=("kernel_regression alpha=0.5",), layers="last 2",
        style="letters", gate=("max_margin=0.02",), out=folder / "out",
    )  # fmt: skip


@pytest.fixture(scope="module")
def done(job):
    return run_optimize(job)


@pytest.fixture(scope="module")
def page(job, done) -> RemixReport:
    return optimize_page(plan_optimize(job), done.rows, done.lines, done.figures)


def test_lines_are_what_items_show(page, done):
    """Flips, right answers and losses of a line can be counted on the page's items."""
    assert [line.method for line in page.lines] == [line.method for line in done.lines]
    for line in page.lines:
        own = page.by_method[line.method]
        assert len(own) == line.items == 8
        assert line.gained == sum(one.flip == "gained" for one in own)
        assert line.lost == sum(one.flip == "lost" for one in own)
        assert line.accuracy.value == pytest.approx(sum(bool(one.correct) for one in own) / 8)
        assert line.loss == pytest.approx(sum(one.loss for one in own) / 8)
        assert line.changed == sum(any(turn.move is not None for turn in one.turns) for one in own)


def test_the_first_method_is_the_method_and_others_are_rivals(page):
    """Controls stand with the method that they doubt."""
    kinds = {line.method: line.kind for line in page.lines}
    assert kinds["ngd steps=2"] == "method"
    assert kinds["kernel_regression alpha=0.5"] == "rival"
    assert [line.method for line in page.ordered[:4]] == [
        "base", "ngd steps=2", "ngd steps=2, random neighbors", "ngd steps=2, shuffled labels",
    ]  # fmt: skip


def test_stages_add_up(page):
    """To the milliseconds of the line; every routing's time holds the plain pass."""
    for line in page.lines:
        assert line.stages["read"] > 0
        assert sum(line.stages.values()) == pytest.approx(line.milliseconds)


def test_it_says_what_was_run(page, done):
    """Model, references, neighbors, settings, versions."""
    text = page.html()
    for told in (done.figures["fingerprint"][:16], "20 tried", "k 3", "max_margin 0.02", "torch"):
        assert told in text


@pytest.mark.usefixtures("done")
def test_texts_only_on_request(job, done, page):
    """The file in the folder has none; with `text` the questions of the shown items are there."""
    written = (job.out / "report.html").read_text(encoding="utf-8")
    assert "which color" not in written
    told = optimize_page(
        plan_optimize(replace(job, text=True)), done.rows, done.lines, done.figures
    )
    assert "which color" in told.html()


def test_a_resumed_run_has_the_same_page(job, done, page, tmp_path, monkeypatch):
    """But for what a clock says: all that it shows was kept with the batches that were done."""
    again = replace(job, out=tmp_path / "out")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(optimize_job, "_rows", killed)
        with pytest.raises(KeyboardInterrupt):
            run_optimize(again)
    resumed = run_optimize(again)
    assert resumed.resumed == 8 * 3 * len(page.lines)
    other = optimize_page(plan_optimize(again), resumed.rows, resumed.lines, resumed.figures)
    assert list(other.items) == list(page.items)


def test_no_page_where_none_is_wanted(job, tmp_path):
    """And the list of files does not promise one."""
    small = replace(job, out=tmp_path / "out", report=False, controls=False, against=())
    found = run_optimize(small)
    assert not (tmp_path / "out" / "report.html").exists()
    assert "report.html" not in found.figures["files"]


def test_free_texts_have_a_page(job, tmp_path):
    """One option: losses, and no word of right answers in the headline."""
    task = lines(
        tmp_path / "free.jsonl", ({"prompt": f"Once {n}", "answer": "upon"} for n in range(4))
    )
    found = run_optimize(replace(job, task=str(task), style="text", gate=(), out=tmp_path / "out"))
    written = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    said = re.search(r'<p class="headline">(.*?)</p>', written)
    assert said is not None
    assert "loss" in said[1]
    assert "p =" not in said[1]
    assert "accuracy-dots" not in written
    assert found.lines[0].items == 4
