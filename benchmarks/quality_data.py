"""Texts and questions for benchmarks/spectr_quality.py, read from the data folder.

Text of a domain is its held-out text, joined and cut into blocks of 128 tokens. Knows no model.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expertmix.study.corpus import Corpus, Sample

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from expert_data import DOMAINS, SEPARATOR

NAMES = tuple(domain.name for domain in DOMAINS)
LENGTH = 128
FIRST = 80  # blocks before it were used while routers were built
UNSEEN = {"arxiv": "arxiv_texts.txt", "github": "github_oss_with_stack_texts.txt"}
TASKS = ("arc_easy", "openbook_qa", "piqa")


@dataclass(frozen=True)
class Question:
    """A choice question.

    Attributes:
        stem: What comes before the choices.
        choices: Texts that may follow.
        gold: Number of the right one.
    """

    stem: str
    choices: tuple[str, ...]
    gold: int


def blocks(data: Path, tokenizer: Any, name: str, first: int, count: int) -> list[list[int]]:
    """Blocks of a domain's held-out text."""
    domain = next(domain for domain in DOMAINS if domain.name == name)
    return _cut(domain.heldout(data), tokenizer, first, count)


def training_blocks(data: Path, tokenizer: Any, name: str, count: int) -> list[list[int]]:
    """Blocks of what a domain's adapter was trained on: to fit a router, never to measure."""
    domain = next(domain for domain in DOMAINS if domain.name == name)
    return _cut(domain.train(data), tokenizer, 0, count)


def heldout(data: Path, tokenizer: Any, count: int) -> Corpus:
    """So many blocks of each domain, labeled."""
    return Corpus(
        tuple(
            Sample(tuple(ids), name, f"{name} {number}")
            for name in NAMES
            for number, ids in enumerate(blocks(data, tokenizer, name, FIRST, count))
        )
    )


def mixtures(data: Path, tokenizer: Any, count: int, seed: int = 0) -> Corpus:
    """Half a block of one domain, then half a block of another; labeled `first>second`."""
    draw = random.Random(seed)
    samples = []
    for number in range(count):
        first, second = draw.sample(NAMES, 2)
        halves = [
            blocks(data, tokenizer, name, FIRST + number % 20, 1)[0] for name in (first, second)
        ]
        ids = halves[0][: LENGTH // 2] + halves[1][: LENGTH // 2]
        samples.append(Sample(tuple(ids), f"{first}>{second}", f"mixture {number}"))
    return Corpus(tuple(samples))


def unseen(data: Path, tokenizer: Any, count: int) -> Corpus:
    """Blocks of text that belongs to no adapter: papers, code, novels."""
    texts = {name: [(data / "domains" / file).read_text()] for name, file in UNSEEN.items()}
    rows = sorted((data / "lambada").glob("*.jsonl"))[0].read_text().splitlines()
    texts["novels"] = [_novel(json.loads(row)) for row in rows[:count]]
    return Corpus(
        tuple(
            Sample(tuple(ids), name, f"{name} {number}")
            for name, parts in texts.items()
            for number, ids in enumerate(_cut(parts, tokenizer, 0, count))
        )
    )


def questions(data: Path, task: str, count: int, seed: int = 0) -> list[Question]:
    """A seeded sample of a task's test questions."""
    rows = [json.loads(row) for row in (data / "choice" / f"{task}.jsonl").read_text().splitlines()]
    drawn = random.Random(seed).sample(rows, min(count, len(rows)))
    return [
        Question(f"{row['query'].strip()}\nAnswer:", tuple(row["choices"]), int(row["gold"]))
        for row in drawn
    ]


def as_corpus(asked: Sequence[Question], tokenizer: Any) -> Corpus:
    """Every stem alone, then with each of its choices."""
    texts = [
        text
        for one in asked
        for text in (one.stem, *(f"{one.stem} {choice}" for choice in one.choices))
    ]
    return Corpus(
        tuple(
            Sample(tuple(tokenizer(text)["input_ids"]), None, f"text {number}")
            for number, text in enumerate(texts)
        )
    )


def right_answers(asked: Sequence[Question], losses: Sequence[float]) -> list[float]:
    """One where the choice of the highest log-likelihood per character is the right one.

    Args:
        asked: The questions.
        losses: Summed over each text of `as_corpus`; the stem's is a part of its choices'.
    """
    found, place = [], 0
    for one in asked:
        stem = losses[place]
        mine = losses[place + 1 : place + 1 + len(one.choices)]
        scores = [(stem - loss) / len(text) for loss, text in zip(mine, one.choices, strict=True)]
        found.append(float(scores.index(max(scores)) == one.gold))
        place += 1 + len(one.choices)
    return found


def _cut(texts: Sequence[str], tokenizer: Any, first: int, count: int) -> list[list[int]]:
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text + SEPARATOR, verbose=False)["input_ids"]
        if len(ids) >= (first + count) * LENGTH:
            break
    starts = range(first * LENGTH, (first + count) * LENGTH, LENGTH)
    found = [ids[start : start + LENGTH] for start in starts]
    return [block for block in found if len(block) == LENGTH]


def _novel(row: dict[str, Any]) -> str:
    return " ".join(str(value) for value in row.values())
