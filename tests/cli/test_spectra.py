from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest


@pytest.fixture
def library(adapters: Path, tmp_path: Path) -> Path:
    """Two adapters, and one of them again."""
    root = Path(shutil.copytree(adapters, tmp_path / "library"))
    shutil.copytree(root / "ada", root / "twin")
    return root


def test_a_library_is_shown(expertmix, library, tmp_path):
    """A row per adapter, its nearest neighbor, the near-duplicates, and the files."""
    answer = expertmix("spectra", library, "--out", tmp_path / "out")
    assert (answer.code, answer.err) == (0, "")
    for word in ("ada", "bob", "twin", "Near-duplicates", "report.html", "1.00"):
        assert word in answer.out
    assert (tmp_path / "out" / "report.html").is_file()
    assert (library / ".expertmix" / "spectra").is_dir()


def test_json_is_all_there_is(expertmix, library, tmp_path):
    """One document, the same as results.json."""
    answer = expertmix("spectra", library, "--out", tmp_path / "out", "--json", "--no-cache")
    assert json.loads(answer.out) == json.loads((tmp_path / "out" / "results.json").read_text())
    assert not (library / ".expertmix").exists()


def test_the_threshold_decides_who_is_a_duplicate(expertmix, library):
    """At 1 nobody is."""
    found = json.loads(expertmix("spectra", library, "--duplicates", "1", "--json").out)
    assert found["duplicates"] == []
    assert expertmix("spectra", library, "--duplicates", "2").code == 2


def test_a_library_that_cannot_be_written_is_told(expertmix, library):
    """A line on stderr; the tables all the same."""
    (library / ".expertmix").write_text("in the way")
    answer = expertmix("spectra", library)
    assert answer.code == 0
    assert "3 adapters could not be kept" in answer.err
    assert "bob" in answer.out


def test_pruning_is_told(expertmix, library):
    """How many went."""
    expertmix("spectra", library)
    shutil.rmtree(library / "bob")
    assert "deleted the spectra of 1 adapter " in expertmix("spectra", library, "--prune").out


def test_no_library_is_told(expertmix):
    """A folder that is not there, and an id that nobody has: exit code 2, one line."""
    for name in ("./nothing", "nobody/nothing"):
        answer = expertmix("spectra", name)
        assert answer.code == 2
        assert answer.err.startswith("error: ")
        assert answer.err.count("\n") == 1
        assert "not a folder" in answer.err
