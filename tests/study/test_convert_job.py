from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import expertmix as em
from expertmix.errors import CheckpointError, ConfigError, OutputError, UnsupportedModelError
from expertmix.study import convert_job
from expertmix.study.convert_job import ConvertJob, plan_convert, run_convert
from expertmix.study.loading import load_model
from study.conftest import everything


@pytest.fixture
def job(dense, adapters, tmp_path) -> ConvertJob:
    return ConvertJob(
        base=str(dense), library=str(adapters), out=tmp_path / "moe", router="random", top_k=2
    )


def _texts(folder: Path, *labels: str | None) -> Path:
    path = folder / "texts.jsonl"
    rows = [
        {"text": f"text of {label} number {n}", "label": label} for n, label in enumerate(labels)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_a_conversion_is_a_moe_of_base_and_adapters(job):
    """It loads, and its sites have the experts of the plan."""
    plan = run_convert(job)
    assert plan.experts == ("base", "ada", "bob")
    sites = em.sites(load_model(str(job.out)))
    assert {site.num_experts for site in sites} == {3}
    weights = (job.out / "model.safetensors").stat().st_size
    assert plan.bytes == pytest.approx(weights, rel=0.05)


def test_a_plan_writes_nothing(job, tmp_path):
    """It says what would come out."""
    before = everything(tmp_path)
    assert plan_convert(job).figures()["experts"] == ["base", "ada", "bob"]
    assert everything(tmp_path) == before


def test_routers_are_fitted_to_labeled_texts(job, tmp_path):
    """Labels are names of adapters."""
    texts = _texts(tmp_path, "ada", "bob", "ada", "bob")
    fitted = replace(job, router="ridge", texts=texts)
    assert plan_convert(fitted).texts == {
        "ada": ["text of ada number 0", "text of ada number 2"],
        "bob": ["text of bob number 1", "text of bob number 3"],
    }
    assert run_convert(fitted).figures()["texts"] == {"ada": 2, "bob": 2}


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"router": "logistic"}, ConfigError, "give --texts"),
        ({"top_k": 9}, ConfigError, "top_k must be between 1 and 3"),
        ({"base": "./nothing"}, CheckpointError, "no model folder"),
        ({"library": "./nothing"}, CheckpointError, "no adapter library"),
    ],
)
def test_a_wrong_job_is_told_before_any_work(job, change, error, says):
    """What, and what to do."""
    with pytest.raises(error, match=says):
        run_convert(replace(job, **change))
    assert not job.out.exists()


@pytest.mark.parametrize(
    ("label", "says"), [("cyd", "no expert is named 'cyd'"), (None, "no label")]
)
def test_texts_for_nobody_are_told_with_their_line(job, tmp_path, label, says):
    """File and line."""
    texts = _texts(tmp_path, "ada", label)
    with pytest.raises(ConfigError, match=rf"texts\.jsonl:2: {says}"):
        plan_convert(replace(job, router="ridge", texts=texts))


def test_a_moe_is_no_base(job, moe):
    """Only what Mixtral computes exactly is converted."""
    with pytest.raises(UnsupportedModelError, match="mixtral"):
        plan_convert(replace(job, base=str(moe)))


def test_a_pickled_base_is_refused(job, pickled):
    """As everywhere."""
    with pytest.raises(CheckpointError, match="pickled"):
        plan_convert(replace(job, base=str(pickled)))


def test_a_wrong_value_in_the_config_is_told(job, dense, tmp_path):
    """By its key."""
    base = Path(shutil.copytree(dense, tmp_path / "copy"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"hidden_size": "abc"}))
    with pytest.raises(CheckpointError, match="'hidden_size' expected int"):
        plan_convert(replace(job, base=str(base)))


def test_what_is_there_is_not_overwritten(job):
    """A folder with content is in the way."""
    job.out.mkdir()
    (job.out / "mine").write_text("")
    with pytest.raises(OutputError, match="exists already"):
        plan_convert(job)


def test_a_disk_without_room_is_told_before_any_work(job, monkeypatch):
    """With what is needed and what is there."""
    monkeypatch.setattr(convert_job, "_size", lambda checkpoint, experts: 10**18)
    with pytest.raises(OutputError, match=r"needs 1,000,000,000,000 MB, the disk has"):
        plan_convert(job)
