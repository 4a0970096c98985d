"""Building a folder so that it is whole or not there at all.

Knows the file system only.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from expertmix.core.partial import output_errors
from expertmix.errors import OutputError


def check_free(target: Path) -> None:
    """Refuses a target that already holds something, before any work is done.

    Raises:
        OutputError: it is a file, or a folder that is not empty.
    """
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise OutputError(f"{target} exists already: choose another folder, or remove it first")


def check_room(target: Path, needed: int) -> None:
    """Refuses a disk that is too full, before any work is done.

    Args:
        target: What is to be written; it need not exist.
        needed: Bytes.

    Raises:
        OutputError: with what is needed and what is there.
    """
    parent = next(path for path in (target.absolute(), *target.absolute().parents) if path.exists())
    with output_errors(target):
        free = shutil.disk_usage(parent).free
    if free < needed:
        raise OutputError(
            f"{target} needs {needed / 1e6:,.0f} MB, the disk has {free / 1e6:,.0f} MB free: "
            f"make room, or choose another disk"
        )


@contextmanager
def building(target: Path, *, or_existing: bool = False) -> Iterator[Path]:
    """Yields an empty folder beside `target` that becomes `target` when the block ends well.

    After an exception the folder is removed and `target` is untouched.

    Args:
        target: does not exist yet, or is an empty folder.
        or_existing: when another process finished the same `target` meanwhile, keep its folder
            and drop this one.

    Raises:
        OutputError: no permission, no space, or something that is not an empty folder in the way.
    """
    with output_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            yield folder
            _move(folder, target, or_existing)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _move(folder: Path, target: Path, or_existing: bool) -> None:
    folder.chmod(0o755)
    for file in folder.rglob("*"):
        file.chmod(0o755 if file.is_dir() else 0o644)
    try:
        folder.replace(target)
    except OSError:
        if not or_existing or not target.is_dir():
            raise
