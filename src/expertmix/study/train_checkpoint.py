"""Checkpoints that are whole or not used: sealed with a manifest, which is written last.

A folder `checkpoint-N` whose manifest is missing was left by a run that was killed while it saved;
one whose files are not those of its manifest is corrupt. Knows folders; not what is in the files.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from expertmix.core.partial import output_errors, write_whole
from expertmix.errors import OutputError

MANIFEST = "manifest.json"
_PREFIX = "checkpoint-"


@dataclass(frozen=True, slots=True)
class Found:
    """Where to go on.

    Attributes:
        folder: The last good checkpoint, or None.
        step: Its step; 0 for None.
        notices: What was passed over, in words.
    """

    folder: Path | None
    step: int
    notices: tuple[str, ...] = ()


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn what torch, safetensors and the system say about writing `path` into `OutputError`."""
    try:
        with output_errors(path):
            yield
    except (RuntimeError, SafetensorError) as problem:  # of a full disk torch says no more
        reason = str(problem).partition("\n")[0]
        raise OutputError(f"cannot write {path}: {reason}. Is the disk full?") from problem


def seal(folder: Path) -> None:
    """Wait until all files are on the disk, then write the manifest.

    Raises:
        OutputError: The disk is full, or the like.
    """
    files = {}
    for path in _files(folder):
        with output_errors(path):
            with path.open("rb") as file:
                os.fsync(file.fileno())
            files[str(path.relative_to(folder))] = _digest(path)
    write_whole(folder / MANIFEST, json.dumps({"sha256": files}, indent=1).encode())


def last_good(out: Path) -> Found:
    """The newest checkpoint that is as it was sealed."""
    notices: list[str] = []
    for step, folder in reversed(_numbered(out)):
        trouble = _trouble(folder)
        if trouble is None:
            return Found(folder, step, tuple(notices))
        notices.append(f"{folder.name} was skipped: {trouble}")
    return Found(None, 0, tuple(notices))


def prune(out: Path, keep: int) -> None:
    """Remove all but the newest sealed checkpoints, and whatever is not sealed."""
    numbered = [folder for _, folder in _numbered(out)]
    sealed = [folder for folder in numbered if (folder / MANIFEST).is_file()]
    for folder in numbered:
        if folder not in sealed[-keep:]:
            remove(folder)


def remove(folder: Path) -> None:
    """Remove a checkpoint; its manifest first, so that what a kill leaves of it is not used."""
    with suppress(OSError):
        (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def discard(out: Path, found: Found) -> None:
    """Remove all checkpoints behind the one to go on from: they are incomplete or corrupt."""
    for step, folder in _numbered(out):
        if step > found.step:
            remove(folder)


def _numbered(out: Path) -> list[tuple[int, Path]]:
    found = []
    for folder in out.glob(f"{_PREFIX}*"):
        number = folder.name.removeprefix(_PREFIX)
        if folder.is_dir() and number.isdecimal():
            found.append((int(number), folder))
    return sorted(found)


def _trouble(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        wanted = json.loads((folder / MANIFEST).read_bytes())["sha256"]
    except FileNotFoundError:
        return "it was not finished"
    except (OSError, ValueError, KeyError, TypeError):
        return f"its {MANIFEST} cannot be read"
    for name, digest in wanted.items():
        try:
            if _digest(folder / name) != digest:
                return f"{name} is corrupt"
        except OSError:
            return f"{name} is missing"
    return None


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
