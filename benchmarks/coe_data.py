"""Texts for benchmarks/coe_quality.py from the data folder: school maths, Python, encyclopedia.

Held out is a seeded share of the documents, without those that share thirteen words in a row with a
training document: paraphrases leak. Knows no model.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from expert_data import DOMAINS

SHARE, WORDS = 0.05, 13
PARTS = {"maths": 4_000_000, "python": 400_000, "encyclopedia": 2_500_000}
"""Domain -> characters, at most."""


def write(data: Path, folder: Path) -> tuple[Path, Path]:
    """Write the two files, if they are not there, and say where.

    Returns:
        Training and held-out documents, .jsonl with the key text.
    """
    train, heldout = folder / "train.jsonl", folder / "heldout.jsonl"
    if not (train.exists() and heldout.exists()):
        folder.mkdir(parents=True, exist_ok=True)
        kept, asked = _split(documents(data))
        _write(train, kept)
        _write(heldout, asked)
    return train, heldout


def documents(data: Path) -> list[str]:
    """Documents of all parts, shuffled: none of them is a rewritten test question."""
    found: list[str] = []
    for name, limit in PARTS.items():
        domain = next(one for one in DOMAINS if one.name == name)
        size = 0
        for text in domain.train(data):
            size += len(text)
            if size > limit:
                break
            found.append(text)
    random.Random(0).shuffle(found)
    return found


def _split(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    cut = int(len(texts) * (1 - SHARE))
    known = {run for text in texts[:cut] for run in _runs(text)}
    asked = [text for text in texts[cut:] if known.isdisjoint(_runs(text))]
    return list(texts[:cut]), asked


def _runs(text: str) -> set[tuple[str, ...]]:
    """All runs of thirteen words; a shorter text is one run."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[at : at + WORDS]) for at in range(max(1, len(words) - WORDS + 1))}


def _write(path: Path, texts: Sequence[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
