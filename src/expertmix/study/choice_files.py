"""Files of choice questions: `read_items`. Knows file formats; what a row means, its layout knows.

`.jsonl` has an object a line; `.json` a list of them; `.csv` a header, or six columns without one
as MMLU; `.parquet` as the hub keeps sets; `.txt` six lines an item, as HellaSwag is kept as text.
Any of the text files may be compressed: `.gz`, `.bz2`.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from expertmix.errors import ConfigError
from expertmix.study.choice import Item
from expertmix.study.choice_layouts import layout_of

Numbered = tuple[int, dict[str, Any]]

_COMPRESSED: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.decompress, ".bz2": bz2.decompress
}  # fmt: skip
_BLOCK = 6  # lines of an item in a HellaSwag text
_MMLU = ("question", "A", "B", "C", "D", "answer")


def read_items(path: str | Path, name: str | None = None) -> list[Item]:
    """All items of a file, in order.

    Args:
        path: The file.
        name: What items are named after; the file's own name by default. An item is `name-12`,
            unless its row has a name.

    Raises:
        ConfigError: No such file, an unknown kind, no row, or a row that cannot be read.
    """
    path = Path(path)
    stem = path.name.partition(".")[0] if name is None else name
    items = []
    for number, row in _rows(path):
        where = f"{path.name}:{number}"
        items.append(layout_of(row, where).item(row, where, f"{stem}-{number}"))
    if not items:
        raise ConfigError(f"{path} holds no item")
    return items


def _rows(path: Path) -> Iterator[Numbered]:
    if path.suffix == ".parquet":
        yield from _parquet(path)
        return
    suffix = path.with_suffix("").suffix if path.suffix in _COMPRESSED else path.suffix
    if suffix not in _READERS:
        raise ConfigError(
            f"{path} is neither .jsonl, .json, .csv, .parquet nor .txt (HellaSwag as text): "
            f"convert or rename it"
        )
    for number, row in _READERS[suffix](_content(path), path.name):
        if not isinstance(row, dict):
            raise ConfigError(f"{path.name}:{number}: expected an object, got {str(row)[:40]!r}")
        yield number, row


def _content(path: Path) -> str:
    try:
        raw = path.read_bytes()
        if path.suffix in _COMPRESSED:
            raw = _COMPRESSED[path.suffix](raw)
        return raw.decode("utf-8-sig")
    except FileNotFoundError as problem:
        raise ConfigError(f"there is no file {path}") from problem
    except UnicodeDecodeError as problem:
        raise ConfigError(f"{path} is not UTF-8 text: {problem}") from problem
    except (OSError, EOFError) as problem:
        raise ConfigError(f"cannot read {path}: {problem}") from problem


def _parquet(path: Path) -> Iterator[Numbered]:
    try:
        table = pq.read_table(path)
    except FileNotFoundError as problem:
        raise ConfigError(f"there is no file {path}") from problem
    except (OSError, pa.ArrowException) as problem:
        raise ConfigError(f"cannot read {path}: {problem}") from problem
    yield from enumerate(table.to_pylist(), 1)


def _jsonl(text: str, name: str) -> Iterator[Numbered]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, _json_value(line, f"{name}:{number}")


def _json(text: str, name: str) -> Iterator[Numbered]:
    found = _json_value(text, name)
    if not isinstance(found, list):
        raise ConfigError(f"{name}: expected a list of objects")
    yield from enumerate(found, 1)


def _json_value(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise ConfigError(f"{where}: not JSON: {problem}") from problem


def _csv(text: str, name: str) -> Iterator[Numbered]:
    try:
        lines = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except csv.Error as problem:
        raise ConfigError(f"{name}: not CSV: {problem}") from problem
    lines = [line for line in lines if any(cell.strip() for cell in line)]
    bare = bool(lines) and len(lines[0]) == len(_MMLU) and lines[0][-1].strip() in set("ABCD")
    header = list(_MMLU) if bare else (lines.pop(0) if lines else [])
    for number, line in enumerate(lines, 1):
        if len(line) != len(header):
            raise ConfigError(
                f"{name}: row {number} has {len(line)} cells for {len(header)} columns"
            )
        yield number, _typed(dict(zip(header, line, strict=True)), f"{name}:{number}")


def _typed(row: dict[str, Any], where: str) -> dict[str, Any]:
    """A list of choices is JSON inside its cell; the number of the right one is a number."""
    if "choices" in row:
        row["choices"] = _json_value(row["choices"], f"{where} (choices must be a JSON list)")
    if "gold" in row and row["gold"].strip().removeprefix("-").isdecimal():
        row["gold"] = int(row["gold"])
    return {key: value for key, value in row.items() if value != "" or key not in ("name", "label")}


def _blocks(text: str, name: str) -> Iterator[Numbered]:
    lines = text.split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    if len(lines) % _BLOCK:
        raise ConfigError(
            f"{name}: {len(lines)} lines are not items of {_BLOCK} lines: context, number of the "
            f"right ending, four endings"
        )
    for start in range(0, len(lines), _BLOCK):
        context, label, *endings = (line.rstrip("\r") for line in lines[start : start + _BLOCK])
        yield start // _BLOCK + 1, {"ctx": context, "label": label, "endings": endings}


_READERS: dict[str, Callable[[str, str], Iterator[Numbered]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".txt": _blocks,
}
