"""Files of training texts as documents: `read_documents`. Knows file formats; no token.

`.jsonl` has an object a line, `.csv` a header, `.parquet` columns; the text is in one column, and
others are ignored. A `.txt` is running text: its documents are paragraphs, lines, or the file.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import random
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from expertmix.errors import ConfigError
from expertmix.study.text_files import read_text

_Numbered = Iterator[tuple[int, Any]]


@dataclass(frozen=True, slots=True)
class Document:
    """One text.

    Attributes:
        text: Not blank.
        where: File and line, or row.
    """

    text: str
    where: str


def read_documents(paths: Iterable[Path], column: str, unit: str) -> list[Document]:
    """All documents of some files, in order.

    Args:
        paths: Files.
        column: Where the text is, in all but .txt.
        unit: `paragraphs`, `lines` or `file`, of .txt.

    Raises:
        ConfigError: A missing file, an unknown kind, no text in it, or a row that is empty or no
            text; the message names file and line.
    """
    return [one for path in paths for one in _documents(path, column, unit)]


def file_hash(path: Path) -> str:
    """SHA-256.

    Raises:
        ConfigError: It cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as problem:
        raise ConfigError(f"cannot read {path}: {problem.strerror or problem}") from problem


def split(
    documents: Sequence[Document], share: float, seed: int
) -> tuple[list[Document], list[Document]]:
    """Split documents into (training, validation), drawn with the seed; equal ones stay together.

    Raises:
        ConfigError: One of the two would be empty.
    """
    groups = list(dict.fromkeys(normalized(one.text) for one in documents))
    random.Random(seed).shuffle(groups)
    held = set(groups[: max(1, round(share * len(groups)))])
    training = [one for one in documents if normalized(one.text) not in held]
    if not training:
        raise ConfigError(
            f"data.validation={share} of {len(groups)} different documents leaves none to train "
            f"on: give more documents (in a .txt, data.unit says what one is), or files"
        )
    return training, [one for one in documents if normalized(one.text) in held]


def repeated(training: Iterable[Document], validation: Iterable[Document]) -> list[Document]:
    """Validation documents that are in the training texts, too, up to case, marks and spaces."""
    known = {normalized(one.text) for one in training}
    return [one for one in validation if normalized(one.text) in known]


def normalized(text: str) -> str:
    """Letters and digits only, in lower case; the text itself where it has none."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return re.sub(r"[\W_]+", " ", plain).strip() or text.strip()


def _documents(path: Path, column: str, unit: str) -> Iterator[Document]:
    if path.suffix == ".txt":
        rows = _units(read_text(path), unit)
    elif path.suffix == ".parquet":
        rows = _parquet(path, column)
    elif path.suffix in _READERS:
        rows = _READERS[path.suffix](read_text(path), path.name, column)
    else:
        raise ConfigError(
            f"{path} is neither .jsonl, .csv, .parquet nor .txt: convert or rename it"
        )
    number = 0
    for number, text in rows:
        yield Document(_checked(text, f"{path.name}:{number}"), f"{path.name}:{number}")
    if not number:
        raise ConfigError(f"{path} holds no text")


def _checked(text: Any, where: str) -> str:
    if not isinstance(text, str):
        raise ConfigError(f"{where}: the text is no text but {text!r:.40}: remove the row")
    if not text.strip():
        raise ConfigError(f"{where}: the text is empty: remove the row")
    try:
        text.encode()
    except UnicodeEncodeError as problem:
        half = ascii(problem.object[problem.start])
        raise ConfigError(f"{where}: {half} is half a character: write all of it") from problem
    return text


def _units(text: str, unit: str) -> _Numbered:
    """Documents of a .txt with the number of their first line; what is blank is between them."""
    if unit == "file":
        if text.strip():
            yield 1, text
        return
    lines: list[str] = []
    for number, line in enumerate([*text.split("\n"), ""], 1):
        if line.strip() and not (unit == "lines" and lines):
            lines.append(line.rstrip("\r"))
            continue
        if lines:
            yield number - len(lines), "\n".join(lines)
        lines = [line.rstrip("\r")] if line.strip() else []


def _jsonl(text: str, name: str, column: str) -> _Numbered:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as problem:
            raise ConfigError(f"{name}:{number}: not JSON: {problem}") from problem
        if not isinstance(row, dict):
            raise ConfigError(f"{name}:{number}: expected an object, got {line[:40]!r}")
        yield number, _cell(row, column, f"{name}:{number}")


def _csv(text: str, name: str, column: str) -> _Numbered:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            yield reader.line_num, _cell(row, column, f"{name}:{reader.line_num}")
    except csv.Error as problem:
        raise ConfigError(f"{name}:{reader.line_num}: not CSV: {problem}") from problem


def _cell(row: dict[str, Any], column: str, where: str) -> Any:
    if column not in row:
        raise ConfigError(
            f"{where}: no column {column!r}; there are {', '.join(map(str, row))}. "
            f"data.column names the one with the text"
        )
    return row[column]


def _parquet(path: Path, column: str) -> _Numbered:
    try:
        file = pq.ParquetFile(path)
        if column not in file.schema_arrow.names:
            _cell(dict.fromkeys(file.schema_arrow.names), column, path.name)
        values = file.read([column]).column(column).to_pylist()
    except FileNotFoundError as problem:
        raise ConfigError(f"there is no file {path}") from problem
    except (OSError, pa.ArrowException) as problem:
        raise ConfigError(f"cannot read {path}: {problem}") from problem
    yield from enumerate(values, 1)


_READERS: dict[str, Callable[[str, str, str], _Numbered]] = {".jsonl": _jsonl, ".csv": _csv}
