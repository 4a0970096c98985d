"""What a model is asked to read: `Prompt`, and the two file formats that hold many of them.

`.txt` has one prompt a line; `.jsonl` has one JSON object a line, `{"text": …, "label": …}`, where
`prompt` may stand for `text` and `label` may be left out. It knows nothing of tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expertmix.errors import ConfigError
from expertmix.study.text_files import read_text

_TEXT_KEYS = ("text", "prompt")
_KNOWN = (*_TEXT_KEYS, "label")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One text.

    Attributes:
        text: What the model reads.
        label: Its group, such as a domain, or None.
        where: File and line, for messages: `prompts.jsonl:3`.
    """

    text: str
    label: str | None = None
    where: str = ""


def read_prompts(path: str | Path) -> tuple[Prompt, ...]:
    """All prompts of a `.txt` or `.jsonl` file, in order; blank lines are skipped.

    Raises:
        ConfigError: No such file, no prompt in it, or a line that is not as described above; the
            message names file and line.
    """
    path = Path(path)
    read_line = _reader(path)
    prompts = tuple(
        read_line(line, f"{path.name}:{number}")
        for number, line in enumerate(read_text(path, "prompt file").split("\n"), 1)
        if line.strip()
    )
    if not prompts:
        raise ConfigError(f"{path} holds no prompt: write one per line")
    return prompts


def _reader(path: Path) -> Callable[[str, str], Prompt]:
    readers = {".txt": _from_text, ".jsonl": _from_json}
    if path.suffix not in readers:
        raise ConfigError(
            f"{path} is neither .txt (one prompt a line) nor .jsonl (one JSON object a line): "
            f"rename it"
        )
    return readers[path.suffix]


def _from_text(line: str, where: str) -> Prompt:
    return Prompt(line.rstrip("\r"), None, where)


def _from_json(line: str, where: str) -> Prompt:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as problem:  # also a number too long, nesting too deep
        raise ConfigError(f"{where}: not JSON: {problem}") from problem
    if not isinstance(row, dict):
        raise ConfigError(f'{where}: expected an object such as {{"text": "…"}}, got {line[:40]!r}')
    unknown = sorted(set(row) - set(_KNOWN))
    if unknown:
        raise ConfigError(f"{where}: unknown key {unknown[0]!r}; known: {', '.join(_KNOWN)}")
    return Prompt(_text(row, where), _label(row, where), where)


def _text(row: dict[str, Any], where: str) -> str:
    given = [row[key] for key in _TEXT_KEYS if key in row]
    if len(given) != 1:
        found = "both" if given else "neither"
        raise ConfigError(f"{where}: give `text` or `prompt`, one of them; {found} is there")
    if not isinstance(given[0], str) or not given[0].strip():
        raise ConfigError(f"{where}: the text must be a string that is not blank")
    return _whole(given[0], where)


def _label(row: dict[str, Any], where: str) -> str | None:
    label = row.get("label")
    if label is not None and not (isinstance(label, str) and label.strip()):
        raise ConfigError(f"{where}: the label must be a string that is not blank, got {label!r}")
    return None if label is None else _whole(label, where)


def _whole(value: str, where: str) -> str:
    """JSON can hold half a character, such as `\\ud800`; no tokenizer and no file can."""
    try:
        value.encode()
    except UnicodeEncodeError as problem:
        half = ascii(problem.object[problem.start])
        raise ConfigError(f"{where}: {half} is half a character: write all of it") from problem
    return value
