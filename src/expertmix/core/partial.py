"""Files that are whole or absent: written under a temporary name, then given their own.

The temporary file lies in the same folder, so that the renaming is atomic; it is called
`.<name>.<process>.partial`. This file does not know what is written.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import BinaryIO

from expertmix.errors import OutputError


class PartialFile:
    """A file that is published whole, or discarded.

    Attributes:
        path: Its temporary path.
        file: Where to write.

    Raises:
        OutputError: It cannot be created there.
    """

    def __init__(self, target: Path) -> None:
        self._target = target
        self._settled = False
        with output_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            self.path, self.file = _create(target)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Wrap each write in it: what the system says becomes `OutputError`."""
        if self._settled:
            raise OutputError(f"writing {self._target} failed before; nothing was kept")
        with output_errors(self._target):
            yield

    def seal(self) -> None:
        """Wait until all of it is on the disk, and close it."""
        with self.writing():
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()

    def publish(self) -> None:
        """Give the sealed file its name, replacing what has it."""
        with self.writing():
            self.path.replace(self._target)
        self._settled = True

    def keep(self) -> Path:
        """Leave the sealed file under its temporary name."""
        self._settled = True
        return self.path

    def discard(self) -> None:
        """Remove the file; does nothing after `publish` or `keep`."""
        if self._settled:
            return
        self._settled = True
        with suppress(OSError):  # what is still buffered may not fit on a full disk
            self.file.close()
        with suppress(OSError):
            self.path.unlink(missing_ok=True)


def write_whole(target: Path, content: bytes) -> int:
    """Write a file whole or not at all; returns its size in bytes.

    Raises:
        OutputError: It cannot be written; nothing is left half-written.
    """
    partial = PartialFile(target)
    try:
        with partial.writing():
            size = partial.file.write(content)
        partial.seal()
        partial.publish()
    finally:
        partial.discard()
    return size


def _create(target: Path) -> tuple[Path, BinaryIO]:
    for attempt in count():
        mark = f"-{attempt}" if attempt else ""
        path = target.with_name(f".{target.name}.{os.getpid()}{mark}.partial")
        with suppress(FileExistsError):  # left by a killed run that had this process number
            return path, path.open("xb")
    raise AssertionError("count() ends")


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn what the system says about writing `path` into `OutputError`."""
    try:
        yield
    except OSError as problem:
        if problem.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = "the disk is full. Nothing was kept; free space or choose another folder"
        elif problem.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            reason = f"no permission ({problem}). Choose another folder"
        else:
            reason = f"{problem}. Choose another path"
        raise OutputError(f"cannot write {path}: {reason}") from problem
