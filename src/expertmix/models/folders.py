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
