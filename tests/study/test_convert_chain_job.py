from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import expertmix as em
from expertmix.errors import CheckpointError, ConfigError, OutputError, UnsupportedModelError
from expertmix.models import folders
from expertmix.study.convert_chain_job import ChainJob, plan_chain, run_chain
from expertmix.study.loading import load_model
from study.conftest import everything, saved


@pytest.fixture(scope="module")
def moe(tmp_path_factory) -> Path:
    """The tiny MoE, without its sliding window."""
    folder = tmp_path_factory.mktemp("models") / "moe"
    return saved(folder, "mixtral", num_local_experts=9, sliding_window=None)


@pytest.fixture
def job(moe, tmp_path) -> ChainJob:
    return ChainJob(model=str(moe), out=tmp_path / "coe")


def test_a_chain_loads_and_has_a_site_per_iteration(job):
    """By the same names as every model."""
    plan = run_chain(job)
    names = {str(site.site) for site in em.sites(load_model(str(job.out)))}
    assert {name.rpartition("#")[2] for name in names} >= {"1"}
    assert len(names) == plan.figures()["layers"] * 2


def test_figures_say_what_is_made(job):
    """And how large it is."""
    figures = run_chain(job).figures()
    weights = (job.out / "model.safetensors").stat().st_size
    assert figures["bytes"] == pytest.approx(weights, rel=0.05)
    assert (figures["to"], figures["iterations"]) == ("coe", 2)


def test_a_plan_writes_nothing(job, tmp_path):
    """Only checks."""
    before = everything(tmp_path)
    assert "1 added iteration at scale 0: same logits" in plan_chain(job).summary()
    assert "one iteration, as before" in plan_chain(replace(job, iterations=1)).summary()
    assert everything(tmp_path) == before


def test_a_chain_goes_back(job, moe, tmp_path):
    """To the family it was made of."""
    run_chain(job)
    back = ChainJob(model=str(job.out), out=tmp_path / "back", to="moe")
    assert "without added iterations, is a" in run_chain(back).summary()
    configs = [json.loads((folder / "config.json").read_text()) for folder in (moe, back.out)]
    assert configs[0] == configs[1]


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"iterations": 0}, ConfigError, "iterations must be at least 1"),
        ({"model": "./nothing"}, CheckpointError, "no model folder"),
        ({"to": "moe"}, UnsupportedModelError, "only a CoE goes back"),
    ],
)
def test_a_wrong_job_is_told_before_any_work(job, tmp_path, change, error, says):
    """What, and what to do."""
    before = everything(tmp_path)
    with pytest.raises(error, match=says):
        run_chain(replace(job, **change))
    assert everything(tmp_path) == before


def test_a_dense_model_is_told_how_to_become_a_moe(job, dense):
    """With a library first."""
    with pytest.raises(UnsupportedModelError, match="expertmix convert BASE LIBRARY"):
        plan_chain(replace(job, model=str(dense)))


def test_pickled_weights_are_refused(job, pickled):
    """As everywhere."""
    with pytest.raises(CheckpointError, match="pickled"):
        plan_chain(replace(job, model=str(pickled)))


def test_what_is_there_is_not_overwritten(job):
    """A folder with content is in the way."""
    job.out.mkdir()
    (job.out / "mine").write_text("")
    with pytest.raises(OutputError, match="exists already"):
        run_chain(job)


def test_a_disk_without_room_is_told_before_any_work(job, monkeypatch):
    """With what is needed and what is there."""
    full = type(shutil.disk_usage("/"))(1, 1, 0)
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda path: full)
    with pytest.raises(OutputError, match="the disk has 0 MB free"):
        run_chain(job)
    assert not Path(job.out).exists()
