"""Choice questions for tests: a task, references, and the data folder where there is one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from expertmix.study.choice import Item

DATA = Path(__file__).parents[3] / "shared" / "data"


def data(name: str) -> Path:
    """A file of the data folder; the test is skipped where it is not there."""
    path = DATA / name
    if not path.exists():
        pytest.skip(f"the data folder has no {name} on this machine")
    return path


def item(number: int = 1, options: int = 3, gold: int = 0, **changes: Any) -> Item:
    """A question about nothing."""
    choices = tuple(f"answer {letter}{number}" for letter in "abcdefgh"[:options])
    fields = {
        "query": f"Question: what is {number}?", "choices": choices, "gold": gold,
        "cue": "\nAnswer:", "name": f"item-{number}", "where": f"items.jsonl:{number}",
    }  # fmt: skip
    return Item(**{**fields, **changes})


def lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Rows as a .jsonl file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def questions(number: int, options: int = 3, start: int = 0) -> list[dict[str, Any]]:
    """Rows of a task whose right answers take turns."""
    words = ("red", "blue", "green", "gold", "gray")
    return [
        {
            "query": f"Question: which color has {n}?",
            "choices": [f"{words[(n + k) % 5]} {k}" for k in range(options)],
            "gold": n % options,
        }
        for n in range(start, start + number)
    ]
