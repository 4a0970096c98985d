"""What is finished of a long run, kept batch by batch: `Ledger`.

A file of JSON lines. The first says what the run is; each later one holds all rows of one batch, so
a batch is there whole or not at all: a line that was cut by a kill is removed on opening. Numbers
are written so that they read back bit for bit. Knows nothing of what the rows mean.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from expertmix.core.partial import output_errors
from expertmix.errors import ConfigError, OutputError

Row = Mapping[str, Any]


class Ledger:
    """Rows of a run; open it with `ledger`.

    Attributes:
        path: The file, or None to keep rows in memory only.
        rows: All rows, in the order in which they were appended.
        resumed: How many of them were there on opening.
    """

    def __init__(self, path: Path | None, rows: Sequence[Row]) -> None:
        self.path = path
        self.rows: list[Row] = list(rows)
        self.resumed = len(rows)

    def append(self, rows: Sequence[Row]) -> None:
        """Keep the rows of one batch; they are on the disk when this returns.

        Raises:
            OutputError: The disk is full, or the like.
        """
        if self.path is not None:
            _append(self.path, list(rows))
        self.rows += rows


def ledger(path: Path | None, identity: Mapping[str, Any], *, restart: bool = False) -> Ledger:
    """Open the ledger of a run, or begin one.

    Args:
        path: The file; None keeps rows in memory.
        identity: What decides what comes out, JSON-ready. Rows of another run are never mixed in.
        restart: Begin anew whatever is there.

    Raises:
        ConfigError: The file belongs to a run with other settings; the message names them.
        OutputError: It cannot be written, or is no ledger.
    """
    if path is None:
        return Ledger(None, [])
    wanted = json.loads(json.dumps(identity))
    lines = [] if restart else _complete(path)
    if not lines[1:]:  # nothing was done yet, with whatever settings
        with output_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
        _append(path, wanted)
        return Ledger(path, [])
    _check(path, lines[0], wanted)
    return Ledger(path, [row for rows in lines[1:] for row in rows])


@contextmanager
def finished(opened: Ledger) -> Iterator[None]:
    """Remove the file when the block, which delivers the results, ends well."""
    yield
    if opened.path is not None:
        with output_errors(opened.path):
            opened.path.unlink(missing_ok=True)


def _complete(path: Path) -> list[Any]:
    """The whole lines; what follows the last of them is cut off in the file."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as problem:
        raise OutputError(f"cannot read {path}: {problem}. Choose another folder") from problem
    whole = raw[: raw.rfind(b"\n") + 1]
    if len(whole) < len(raw):
        with output_errors(path), path.open("r+b") as file:
            file.truncate(len(whole))
    try:
        return [json.loads(line) for line in whole.splitlines()]
    except ValueError as problem:
        raise OutputError(
            f"{path} is not what an unfinished run left: {problem}. Remove it, or choose another "
            f"folder"
        ) from problem


def _append(path: Path, content: Any) -> None:
    line = json.dumps(content, separators=(",", ":")) + "\n"
    with output_errors(path), path.open("ab") as file:
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def _check(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    keys = [key for key in {**wanted, **found} if found.get(key) != wanted.get(key)]
    if keys:
        other = ", ".join(f"{key} {found.get(key)!r} (now {wanted.get(key)!r})" for key in keys[:3])
        raise ConfigError(
            f"{path.parent} holds an unfinished run with other settings: {other}. Repeat its "
            f"settings to go on with it, choose another --out, or discard it with --restart."
        )
