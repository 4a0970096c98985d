"""Tensors of many rows on disk: one file for some rows, each tensor of a shape of its own.

All rows of a name lie in one flat tensor, with a table of their shapes in the file's header, so a
row is read without the others. A file is written whole or not at all, and never changed: what is
read lazily is mapped into memory, and a mapped file that is overwritten kills the process.

Knows safetensors; not what rows are. Legend: R rows of a file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from expertmix.core.partial import output_errors, write_whole
from expertmix.errors import ConfigError

Row = Mapping[str, Tensor]
_SHAPES = "shapes"
_NOTES = "notes"


def write_rows(path: Path, rows: Sequence[Row], notes: Any = None) -> int:
    """Write a file; it is there when all of it is on the disk.

    Args:
        path: Of the file; its folder is made.
        rows: R rows; a name has one dtype in all of them, and may be missing in some.
        notes: Anything JSON-ready, kept in the header.

    Returns:
        The file's size in bytes.

    Raises:
        OutputError: It cannot be written.
    """
    names = sorted({name for row in rows for name in row})
    flat = {name: _flat([row[name] for row in rows if name in row]) for name in names}
    shapes = {
        name: [list(row[name].shape) if name in row else None for row in rows] for name in names
    }
    header = {_SHAPES: json.dumps(shapes), _NOTES: json.dumps(notes)}
    return write_whole(path, save(flat, header))


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file, whole or not at all.

    Raises:
        OutputError: It cannot be written.
    """
    write_whole(path, (json.dumps(data, indent=1) + "\n").encode())


def read_json(path: Path) -> Any:
    """What `write_json` wrote.

    Raises:
        ConfigError: No such file, or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise ConfigError(f"cannot read {path}: {problem}") from problem


def make_folder(folder: Path) -> None:
    """Make a folder for results, if it is not there.

    Raises:
        OutputError: It cannot be made.
    """
    with output_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)


class RowFile:
    """A file of rows, open; rows are read when they are asked for.

    Args:
        path: What `write_rows` wrote.

    Raises:
        ConfigError: No such file, or truncated, or of another kind.
    """

    def __init__(self, path: Path) -> None:
        try:
            opened: Any = safe_open(path, framework="pt")
            header = opened.metadata() or {}
            shapes, self.notes = json.loads(header[_SHAPES]), json.loads(header[_NOTES])
        except (OSError, SafetensorError, KeyError, ValueError) as problem:
            raise ConfigError(
                f"cannot read {path}: {problem}. Remove its folder and build it again"
            ) from problem
        self._file = opened
        self._places = {name: _places(table) for name, table in shapes.items()}

    def row(self, number: int) -> dict[str, Tensor]:
        """One row."""
        found = {}
        for name, places in self._places.items():
            begin, end, shape = places[number]
            if shape is not None:
                found[name] = self._file.get_slice(name)[begin:end].view(shape)
        return found

    def rows(self) -> list[dict[str, Tensor]]:
        """All rows, read at once."""
        flat = {name: self._file.get_tensor(name) for name in self._places}
        count = max((len(places) for places in self._places.values()), default=0)
        return [
            {
                name: flat[name][places[number][0] : places[number][1]].view(places[number][2])
                for name, places in self._places.items()
                if places[number][2] is not None
            }
            for number in range(count)
        ]


def _flat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.detach().cpu().contiguous().view(-1) for part in parts])


def _places(table: Sequence[list[int] | None]) -> list[tuple[int, int, Any]]:
    places, begin = [], 0
    for shape in table:
        end = begin + (0 if shape is None else prod(shape))
        places.append((begin, end, shape))
        begin = end
    return places
