from __future__ import annotations

import pytest

from expertmix.errors import ConfigError, OutputError
from expertmix.study.ledger import finished, ledger

ROWS = [{"item": 0, "score": 0.1 + 0.2}, {"item": 1, "score": float("-inf")}]


def test_rows_read_back_as_they_were(tmp_path):
    """Bit for bit, in order; a second run of the same settings goes on."""
    path = tmp_path / "out" / "progress.jsonl"
    book = ledger(path, {"k": 3})
    assert book.resumed == 0
    book.append(ROWS)
    book.append([])
    again = ledger(path, {"k": 3})
    assert again.rows == ROWS
    assert again.resumed == 2


def test_a_line_that_was_cut_is_gone(tmp_path):
    """Killed at any byte of a batch: the batches before it are there, and the next is whole."""
    path = tmp_path / "progress.jsonl"
    ledger(path, {}).append(ROWS[:1])
    whole = path.read_bytes()
    ledger(path, {}).append(ROWS[1:])
    for cut in range(len(whole), len(path.read_bytes())):
        torn = tmp_path / f"{cut}.jsonl"
        torn.write_bytes(path.read_bytes()[:cut])
        book = ledger(torn, {})
        assert book.rows == ROWS[:1]
        book.append(ROWS[1:])
        assert ledger(torn, {}).rows == ROWS


def test_other_settings_are_never_mixed_in(tmp_path):
    """The message names what differs; restart begins anew."""
    path = tmp_path / "progress.jsonl"
    ledger(path, {"k": 3, "seed": 0}).append(ROWS)
    with pytest.raises(ConfigError, match=r"k 3 \(now 5\)"):
        ledger(path, {"k": 5, "seed": 0})
    assert ledger(path, {"k": 5, "seed": 0}, restart=True).rows == []
    assert ledger(path, {"k": 7}).rows == []  # nothing was done, so nothing can be mixed up


def test_a_finished_run_leaves_none(tmp_path):
    """Unless its results could not be delivered."""
    book = ledger(tmp_path / "progress.jsonl", {})
    with pytest.raises(OutputError), finished(book):
        raise OutputError("full")
    assert (tmp_path / "progress.jsonl").exists()
    with finished(book):
        pass
    assert not (tmp_path / "progress.jsonl").exists()


def test_memory_needs_no_file():
    """Rows are kept all the same."""
    book = ledger(None, {})
    with finished(book):
        book.append(ROWS)
    assert book.rows == ROWS


def test_a_file_that_is_no_ledger_is_told(tmp_path):
    """Not overwritten."""
    path = tmp_path / "progress.jsonl"
    path.write_text("hello\n")
    with pytest.raises(OutputError, match="is not what an unfinished run left"):
        ledger(path, {})
    assert path.read_text() == "hello\n"
