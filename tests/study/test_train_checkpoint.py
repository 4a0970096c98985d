from __future__ import annotations

from pathlib import Path

import pytest

from expertmix.study.train_checkpoint import MANIFEST, discard, last_good, prune, seal


def checkpoint(out: Path, step: int, *, sealed: bool = True) -> Path:
    folder = out / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(bytes([step]))
    if sealed:
        seal(folder)
    return folder


def test_the_newest_whole_checkpoint_is_taken(tmp_path: Path) -> None:
    """By its number, not by its letters."""
    for step in (2, 10):
        checkpoint(tmp_path, step)
    found = last_good(tmp_path)
    assert (found.folder, found.step, found.notices) == (tmp_path / "checkpoint-10", 10, ())
    assert last_good(tmp_path / "none").folder is None


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda folder: (folder / MANIFEST).unlink(), "it was not finished"),
        (lambda folder: (folder / "weights").write_bytes(b"x"), "weights is corrupt"),
        (lambda folder: (folder / "weights").unlink(), "weights is missing"),
        (lambda folder: (folder / MANIFEST).write_text("{"), "its manifest.json cannot be read"),
    ],
)
def test_a_broken_checkpoint_is_skipped_with_a_notice(tmp_path: Path, harm, said: str) -> None:
    """And the one before is taken; discarding removes the broken one."""
    checkpoint(tmp_path, 1)
    harm(checkpoint(tmp_path, 2))
    found = last_good(tmp_path)
    assert found.step == 1
    assert found.notices == (f"checkpoint-2 was skipped: {said}",)
    discard(tmp_path, found)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_pruning_keeps_the_newest_sealed_ones(tmp_path: Path) -> None:
    """What is not sealed does not count, and goes."""
    for step in (1, 2, 3):
        checkpoint(tmp_path, step)
    checkpoint(tmp_path, 4, sealed=False)
    prune(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-3"]
