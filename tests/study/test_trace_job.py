from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import expertmix as em
from expertmix.errors import (
    ContextLengthError,
    CorruptTraceError,
    FingerprintError,
    ReplayError,
    UnknownExpertError,
)
from expertmix.study.trace_job import TraceJob, plan_trace, run_trace
from study.conftest import everything


@pytest.fixture
def job(moe, prompts, tmp_path) -> TraceJob:
    return TraceJob(model=str(moe), prompts=prompts, out=tmp_path / "out")


def test_a_job_writes_trace_results_and_page(job):
    """All three, and results.json is what the call returned."""
    done = run_trace(job)
    assert everything(job.out) == ["report.html", "results.json", "trace.parquet"]
    assert json.loads((job.out / "results.json").read_text()) == done.figures
    trace = em.Trace.load(job.out / "trace.parquet")
    assert trace.labels == {0: "maths", 1: "python", 2: "maths"}
    assert done.figures["tokens"] == int(trace.tokens.real.sum())
    assert done.figures["files"] == ["trace.parquet", "results.json", "report.html"]
    assert done.figures["loss_without_edits"] is None


def test_prompt_text_is_left_out_unless_asked_for(job):
    """Neither in the trace, nor on the page, nor in the results."""
    run_trace(job)
    assert em.Trace.load(job.out / "trace.parquet").text is None
    assert b"def add" not in b"".join(file.read_bytes() for file in job.out.iterdir())
    run_trace(replace(job, text=True))
    assert "".join(em.Trace.load(job.out / "trace.parquet").text).startswith("two and two is four")


def test_edits_are_compared_with_a_run_without_them(job):
    """The unedited loss is that of the same job without edits; the trace is the edited one."""
    plain = run_trace(job)
    edited = run_trace(replace(job, ablate=("*:python",), mask=("*.layers.0.mlp:0",)))
    assert edited.figures["loss_without_edits"] == plain.figures["loss"]
    assert edited.figures["loss"] != plain.figures["loss"]
    assert edited.figures["edits"] == ["ablate *:python", "mask *.layers.0.mlp:0"]
    trace = em.Trace.load(job.out / "trace.parquet")
    assert not trace[trace.sites[0]].dense()[trace.tokens.real][:, [0, 3]].any()
    assert [edit["kind"] for edit in edited.figures["interventions"]] == ["ablate", "mask"]


def test_replaying_a_trace_reproduces_the_run(job, tmp_path):
    """Also under an edit that would have changed the decisions."""
    first = run_trace(job)
    kept = (job.out / "trace.parquet").rename(tmp_path / "kept.parquet")
    again = run_trace(replace(job, replay=kept))
    assert again.figures["loss"] == first.figures["loss"]
    before, after = em.Trace.load(kept), em.Trace.load(job.out / "trace.parquet")
    assert all(torch.equal(before[s].weights, after[s].weights) for s in before.sites)


def test_a_trace_of_another_model_is_refused(job, other_moe, tmp_path):
    """Nothing is written."""
    run_trace(replace(job, report=False))
    kept = (job.out / "trace.parquet").rename(tmp_path / "kept.parquet")
    before = everything(tmp_path)
    with pytest.raises(FingerprintError, match="this model is"):
        run_trace(replace(job, model=str(other_moe), replay=kept))
    assert everything(tmp_path) == before


def test_a_plan_needs_no_weights_and_writes_nothing(job, tmp_path):
    """Every input is checked all the same."""
    before = everything(tmp_path)
    plan = plan_trace(replace(job, ablate=("*:python",)))
    assert plan.figures()["runs"] == 2
    assert plan.figures()["samples"] == 3
    with pytest.raises(UnknownExpertError):
        plan_trace(replace(job, mask=("*:nobody",)))
    assert everything(tmp_path) == before


def test_a_long_prompt_is_refused_or_cut(job):
    """The context is the model's: 128."""
    job.prompts.write_text('{"text": "' + "a" * 200 + '"}')
    with pytest.raises(ContextLengthError, match=r"prompts\.jsonl:1: the text has 200 tokens"):
        run_trace(job)
    assert not job.out.exists()
    done = run_trace(replace(job, truncate=True))
    assert done.figures["prompts"][0]["cut"] == 72


def test_a_corrupt_trace_is_not_replayed(job, tmp_path):
    """Truncated, or something else."""
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and so on")
    with pytest.raises(CorruptTraceError, match=r"bad\.parquet"):
        run_trace(replace(job, replay=tmp_path / "bad.parquet"))
    assert not job.out.exists()


def test_a_trace_of_other_text_is_not_replayed(job, tmp_path):
    """Told before the weights are read, with the place of the first prompt that differs."""
    run_trace(replace(job, report=False))
    kept = (job.out / "trace.parquet").rename(tmp_path / "kept.parquet")
    (tmp_path / "other.txt").write_text("four and four is eight\n")
    before = everything(tmp_path)
    with pytest.raises(ReplayError, match=r"sample 0 is not the prompt at .*other\.txt:1"):
        plan_trace(replace(job, prompts=tmp_path / "other.txt", replay=kept))
    assert everything(tmp_path) == before


def test_results_are_the_same_again(job):
    """Two runs of a job give the same numbers."""
    first, second = run_trace(job), run_trace(job)
    for key in ("loss", "usage", "prompts", "fingerprint"):
        assert first.figures[key] == second.figures[key]


def test_a_label_that_reads_all_text_hides_nothing(job):
    """All text together then has another name, with its own loss."""
    job.prompts.write_text(
        '{"text": "two and two", "label": "all text"}\n{"text": "def add(a, b)"}\n'
    )
    done = run_trace(job)
    rows = {row[0]: row for row in done.tables[0].rows}
    assert list(rows) == ["(all text)", "all text", "unlabeled"]
    assert rows["(all text)"][1] == 2
    assert rows["(all text)"][3] == pytest.approx(done.figures["loss"]["all"], abs=1e-4)
