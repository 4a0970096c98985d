from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from expertmix.errors import CheckpointError, ConfigError, OutputError
from expertmix.experts.overlap import Overlap
from expertmix.experts.shelf import Shelf
from expertmix.models.default import ASSETS
from expertmix.study import spectra_job
from expertmix.study.spectra_job import SpectraJob, run_spectra
from study.conftest import everything


@pytest.fixture
def library(adapters: Path, tmp_path: Path) -> Path:
    """Two adapters, and one of them again."""
    root = Path(shutil.copytree(adapters, tmp_path / "library"))
    shutil.copytree(root / "ada", root / "twin")
    return root


def test_a_folder_of_results(library, tmp_path):
    """results.json holds what the measures say, the page is there, and spectra are kept."""
    done = run_spectra(SpectraJob(library=str(library), out=tmp_path / "out"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"results.json", "report.html"}
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert content == done.figures
    shelf = Shelf.open(library)
    overlap = Overlap.of(shelf)
    assert [one["name"] for one in content["adapters"]] == ["ada", "bob", "twin"]
    assert [one["digest"] for one in content["adapters"]] == [one.digest for one in shelf]
    assert content["overlap"]["reads"][0][1] == pytest.approx(float(overlap.reads[0, 1]), abs=1e-4)
    assert content["adapters"][0]["nearest"] == content["duplicates"][0]
    assert (content["duplicates"][0]["first"], content["duplicates"][0]["second"]) == (
        "ada", "twin",
    )  # fmt: skip
    module, spectrum = next(iter(shelf.adapters[1].modules.items()))
    assert content["modules"]["bob"][module]["singular"] == pytest.approx(
        spectrum.singular.tolist(), abs=1e-6
    )
    assert content["cache"] == {"wanted": True, "kept": 3, "pruned": 0}
    assert len(list((library / ".expertmix" / "spectra").iterdir())) == 2  # equal ones share


def test_nothing_is_written_where_nothing_is_wanted(library):
    """No results folder and no cache: not a file."""
    before = everything(library)
    done = run_spectra(SpectraJob(library=str(library), cache=False))
    assert everything(library) == before
    assert done.figures["files"] == []
    assert done.figures["cache"] == {"wanted": False, "kept": 0, "pruned": 0}


def test_the_shipped_library_gets_no_cache_inside_the_package(tmp_path, monkeypatch):
    """`default` keeps its spectra in the user's cache."""
    monkeypatch.setenv("EXPERTMIX_CACHE", str(tmp_path / "cache"))
    before = everything(ASSETS)
    done = run_spectra(SpectraJob(library="default"))
    assert everything(ASSETS) == before
    assert len(done.figures["adapters"]) == len(list((tmp_path / "cache" / "spectra").iterdir()))


def test_pruning_deletes_what_is_gone(library):
    """Only when asked for."""
    job = SpectraJob(library=str(library))
    run_spectra(job)
    shutil.rmtree(library / "bob")
    assert run_spectra(job).figures["cache"]["pruned"] == 0
    assert run_spectra(replace(job, prune=True)).figures["cache"] == {
        "wanted": True, "kept": 2, "pruned": 1,
    }  # fmt: skip


def test_one_adapter_cannot_prune_its_neighbors(library):
    """Its spectra lie among theirs."""
    with pytest.raises(ConfigError, match="whole library"):
        SpectraJob(library=str(library / "ada"), prune=True)


def test_a_library_that_cannot_be_written_is_looked_at(library):
    """And the figures say that nothing was kept."""
    (library / ".expertmix").write_text("in the way")
    assert run_spectra(SpectraJob(library=str(library))).figures["cache"]["kept"] == 0


def test_large_libraries_get_a_summary(library, monkeypatch):
    """Long lists are left out; adapters and duplicates stay."""
    monkeypatch.setattr(spectra_job, "_MOST_NUMBERS", 5)
    content = run_spectra(SpectraJob(library=str(library))).figures
    assert content["modules"] is content["overlap"] is None
    assert len(content["adapters"]) == 3
    assert len(content["duplicates"]) == 1


def test_wrong_input_is_told(library, tmp_path):
    """A threshold that is no cosine, pruning without a cache, no library, a file as folder."""
    for wrong in (
        {"duplicates": 1.5},
        {"duplicates": float("nan")},
        {"prune": True, "cache": False},
    ):
        with pytest.raises(ConfigError):
            SpectraJob(library=str(library), **wrong)
    before = everything(tmp_path)
    with pytest.raises(CheckpointError, match="not a folder"):
        run_spectra(SpectraJob(library="./nothing", out=tmp_path / "out"))
    with pytest.raises(OutputError):
        run_spectra(SpectraJob(library=str(library), out=library / "ada" / "adapter_config.json"))
    assert everything(tmp_path) == before
