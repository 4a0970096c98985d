"""The figures of a run as they come: `MetricsFile`, one JSON line per log."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from expertmix.core.partial import output_errors, write_whole

Line = Mapping[str, Any]
Tell = Callable[[Line], None]
"""Called with each line: `step`, and what was measured."""


def silent(line: Line) -> None:
    """Tells nobody."""


class MetricsFile:
    """Lines that are on the disk when `append` returns.

    Args:
        path: The file.
        step: Where the run goes on: what an earlier run wrote about later steps is removed.

    Raises:
        OutputError: It cannot be written.
    """

    def __init__(self, path: Path, step: int) -> None:
        self._path = path
        kept = [line for line in read_metrics(path) if line.get("step", 0) <= step]
        write_whole(path, b"".join(_encoded(line) for line in kept))

    def append(self, line: Line) -> None:
        """Write a line.

        Raises:
            OutputError: The disk is full, or the like.
        """
        with output_errors(self._path), self._path.open("ab") as file:
            file.write(_encoded(line))
            file.flush()
            os.fsync(file.fileno())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a file; none where there is no file."""
    if not path.is_file():
        return []
    found = []
    for raw in path.read_bytes().splitlines():
        try:
            line = json.loads(raw)
        except ValueError:  # cut by a kill
            continue
        if isinstance(line, dict):
            found.append(line)
    return found


def _encoded(line: Line) -> bytes:
    return (json.dumps(_finite(line), ensure_ascii=False, allow_nan=False) + "\n").encode()


def _finite(value: Any) -> Any:
    """JSON has no NaN: null. Seven digits are what a float32 has."""
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list | tuple) else value
