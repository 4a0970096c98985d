from __future__ import annotations

import json
from pathlib import Path

import pytest

from expertmix.errors import OutputError
from expertmix.study.outputs import results, write_json
from study.conftest import everything


def _write(out: Path, *names: str, problem: type[BaseException] | None = None) -> None:
    with results(out) as work:
        for name in names:
            (work / name).write_text("new")
        if problem:
            raise problem


def test_files_appear_at_the_end(tmp_path):
    """Until the block ends the folder shows nothing but a hidden workplace."""
    out = tmp_path / "a" / "b"
    with results(out) as work:
        (work / "one.txt").write_text("1")
        assert not (out / "one.txt").exists()
    assert everything(out) == ["one.txt"]


def test_an_existing_folder_is_reused(tmp_path):
    """Files of the same name are replaced, others stay."""
    (tmp_path / "one.txt").write_text("old")
    (tmp_path / "mine.txt").write_text("mine")
    with results(tmp_path) as work:
        (work / "one.txt").write_text("new")
    assert (tmp_path / "one.txt").read_text() == "new"
    assert everything(tmp_path) == ["mine.txt", "one.txt"]


@pytest.mark.parametrize("problem", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_everything_as_it_was(tmp_path, problem):
    """No new file, no new folder, old files untouched; also when interrupted."""
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "one.txt").write_text("old")
    for out in (tmp_path / "old", tmp_path / "new" / "deep"):
        with pytest.raises(problem):
            _write(out, "one.txt", problem=problem)
    assert everything(tmp_path) == ["old", "old/one.txt"]
    assert (tmp_path / "old" / "one.txt").read_text() == "old"


def test_a_file_in_the_way_is_told_before_any_work(tmp_path):
    """As the folder itself, and as one of its parents."""
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(OutputError, match="file"), results(out):
            pytest.fail("the block ran")
    assert everything(tmp_path) == ["file"]


def test_a_folder_in_the_way_of_a_file_replaces_nothing(tmp_path):
    """All files take their places, or none."""
    (tmp_path / "two.txt").mkdir()
    with pytest.raises(OutputError, match=r"two\.txt is a folder"):
        _write(tmp_path, "one.txt", "two.txt")
    assert everything(tmp_path) == ["two.txt"]


def test_no_permission_is_told(locked):
    """Before any work."""
    with pytest.raises(OutputError, match="out"), results(locked / "out"):
        pytest.fail("the block ran")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is a Linux device")
def test_a_full_disk_is_told():
    """As an OutputError that says so."""
    with pytest.raises(OutputError, match="the disk is full"):
        write_json(Path("/dev/full"), {"a": 1})


def test_json_has_no_nan(tmp_path):
    """A results file is read by every JSON parser."""
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "r.json", {"a": float("nan")})
    write_json(tmp_path / "r.json", {"a": "ü"})
    assert json.loads((tmp_path / "r.json").read_text()) == {"a": "ü"}
