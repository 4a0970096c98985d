"""A results folder whose files appear whole, all at the end.

While a study runs, its files lie in a hidden folder inside; when it ends well they take their
places, replacing older ones. After an exception nothing new is left, also no empty folder.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from expertmix.core.partial import output_errors
from expertmix.errors import OutputError


@contextmanager
def results(folder: Path) -> Iterator[Path]:
    """Yields a workplace; its files move into `folder` when the block ends well.

    Raises:
        OutputError: On entering, before any work: no permission, or a file in the way. At the end:
            a folder has the name of a result.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file: name a folder for the results")
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with output_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            workplace = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder))
        try:
            yield workplace
            _deliver(workplace, folder)
        finally:
            shutil.rmtree(workplace, ignore_errors=True)
    finally:
        _remove_empty(created)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a result as JSON.

    Raises:
        OutputError: The disk is full, or the like.
    """
    with output_errors(path):
        path.write_text(as_json(content) + "\n", encoding="utf-8")


def as_json(content: Mapping[str, Any]) -> str:
    """JSON as results are written: indented, no NaN."""
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)


def _deliver(workplace: Path, folder: Path) -> None:
    files = sorted(workplace.iterdir())
    for file in files:
        target = folder / file.name
        if target.is_dir():
            raise OutputError(f"{target} is a folder where a result should go: remove it")
    for file in files:
        with output_errors(folder / file.name):
            file.replace(folder / file.name)


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):  # it holds results
            folder.rmdir()
