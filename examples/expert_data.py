"""The eight domains of the shipped expert library: what trains each expert, and what measures it.

Knows the files of the data folder and how a text of each domain is written. Knows no model.
Only training splits that may be shipped are read for training; held-out texts are never
trained on by any expert. One overlap needs care: the backward-maths rows are made from
questions of the gsm8k *test* split, so the maths domain is measured on those test questions
only whose backward twin no expert has seen.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SEPARATOR = "<|endoftext|>"


@dataclass(frozen=True)
class Domain:
    """One expert's domain: its texts, and how its adapter is trained.

    Attributes:
        name: folder name of the adapter.
        rank: LoRA rank.
        steps: optimizer steps of 8 x 128 tokens.
        source: the training data, in words.
        licence: licence of that data.
        train: data folder -> training texts.
        heldout: data folder -> texts that no expert was trained on.
    """

    name: str
    rank: int
    steps: int
    source: str
    licence: str
    train: Callable[[Path], list[str]]
    heldout: Callable[[Path], list[str]]


def _jsonl(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.strip()]


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _tail(rows: list[Any], share: float) -> int:
    return int(len(rows) * (1 - share))


def _question(question: str, answer: str) -> str:
    return f"Question: {question.strip()}\nAnswer: {answer.strip()}\n"


# -- maths and backward maths ------------------------------------------------------------------


def _backward_rows(data: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    rows = _jsonl(data / "metamath_gsm_backward" / "GSM8K_Backward.jsonl")
    return [row for i, row in enumerate(rows) if i % 5], rows[::5]


def _backward_text(row: dict[str, Any]) -> str:
    """One form for the two kinds of rows: reasoning that ends in 'The value of x is …'."""
    answer = row.get("output") or row["inv_question_pred_answer"]
    answer = answer.removeprefix("Let's think step by step.").partition("\n####")[0]
    return _question(row["question"], answer)


def _maths_train(data: Path) -> list[str]:
    rows = _jsonl(data / "gsm8k" / "train.jsonl")
    return [_question(row["question"], row["answer"]) for row in rows]


def _maths_heldout(data: Path) -> list[str]:
    seen = {row["original_question"] for row in _backward_rows(data)[0]}
    rows = _jsonl(data / "gsm8k" / "test.jsonl")
    return [
        _question(row["question"], row["answer"]) for row in rows if row["question"] not in seen
    ]


def _backward_train(data: Path) -> list[str]:
    return [_backward_text(row) for row in _backward_rows(data)[0]]


def _backward_heldout(data: Path) -> list[str]:
    return [_backward_text(row) for row in _backward_rows(data)[1]]


# -- python ------------------------------------------------------------------------------------


def _mbpp(data: Path, first: int, last: int) -> list[str]:
    texts = []
    for row in _jsonl(data / "mbpp" / "mbpp.jsonl"):
        if first <= row["task_id"] <= last:
            code = row["code"].replace("\r\n", "\n").expandtabs(4).strip()
            texts.append(f'"""\n{row["text"].strip()}\n{row["test_list"][0]}\n"""\n{code}\n')
    return texts


# -- medicine ----------------------------------------------------------------------------------


def _pubmed(data: Path, *, test: bool) -> list[str]:
    tests = _json(data / "pubmedqa" / "test_ground_truth.json")
    rows = _json(data / "pubmedqa" / "ori_pqal.json")
    return [_pubmed_text(row) for key, row in rows.items() if (key in tests) is test]


def _pubmed_text(row: dict[str, Any]) -> str:
    abstract = "\n".join(row["CONTEXTS"])
    answer = f"{row['final_decision'].capitalize()}. {row['LONG_ANSWER']}"
    return f"Abstract: {abstract}\n" + _question(row["QUESTION"], answer)


# -- Shakespeare -------------------------------------------------------------------------------


def _shakespeare(data: Path, *, heldout: bool) -> list[str]:
    text = (data / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")
    speeches = text.split("\n\n")
    cut = _tail(speeches, 0.1)
    chosen = speeches[cut:] if heldout else speeches[:cut]
    return ["\n\n".join(chosen[i : i + 40]) + "\n" for i in range(0, len(chosen), 40)]


# -- science and reading -----------------------------------------------------------------------


def _science_text(row: dict[str, Any]) -> str:
    stem, _, rest = row["instruction"].partition(": ")[2].rpartition("\n\nAnswer1: ")
    choices = re.split(r" Answer\d: ", rest.partition("\n\nAnswer format")[0])
    answer = choices[int(row["answer"].removeprefix("answer")) - 1]
    return _question(stem, answer) if stem.endswith("?") else f"{stem.strip()} {answer.strip()}\n"


def _science(data: Path, *, heldout: bool) -> list[str]:
    texts: list[str] = []
    for name in ("arc_easy", "arc_challenge", "openbook_qa"):
        rows = _json(data / "choice_train" / f"{name}.json")
        cut = _tail(rows, 0.1)
        texts += [_science_text(row) for row in (rows[cut:] if heldout else rows[:cut])]
    return texts


def _reading(data: Path, *, heldout: bool) -> list[str]:
    rows = _json(data / "choice_train" / "boolq.json")
    cut = _tail(rows, 0.1)
    return [_reading_text(row) for row in (rows[cut:] if heldout else rows[:cut])]


def _reading_text(row: dict[str, Any]) -> str:
    question = row["instruction"].partition("question: ")[2].partition("\n\nAnswer format")[0]
    return _question(question, "yes" if row["answer"] == "true" else "no")


# -- encyclopedia ------------------------------------------------------------------------------

_SPACING = (
    (r" @([-,.])@ ", r"\1"),
    (r" ([,.;:!?)\]])", r"\1"),
    (r"([(\[]) ", r"\1"),
    (r" (n't|'s|'re|'ve|'ll|'d|'m|')\b", r"\1"),
    (r'" ([^"]*?) "', r'"\1"'),
)


def _wikitext(data: Path, split: str) -> list[str]:
    lines = (data / "wikitext2" / f"{split}.txt").read_text(encoding="utf-8").splitlines()
    texts = (_prose(line.strip()) for line in lines if not line.startswith(" ="))
    return [text + "\n" for text in texts if len(text) > 200]


def _prose(paragraph: str) -> str:
    """Undoes the tokenization and drops sentences with words cut out of the vocabulary."""
    sentences = paragraph.split(" . ")
    text = " . ".join(s for s in sentences if "<unk>" not in s)
    for pattern, replacement in _SPACING:
        text = re.sub(pattern, replacement, text)
    return text.strip()


DOMAINS: tuple[Domain, ...] = (
    Domain("maths", 8, 150, "GSM8K train split", "MIT", _maths_train, _maths_heldout),
    Domain(
        "backward", 8, 120, "MetaMath GSM8K_Backward, four rows of five", "Apache-2.0",
        _backward_train, _backward_heldout,
    ),
    Domain(
        "python", 8, 90, "MBPP tasks 601-974", "CC BY 4.0",
        lambda data: _mbpp(data, 601, 974), lambda data: _mbpp(data, 11, 510),
    ),
    Domain(
        "medicine", 16, 130, "PubMedQA (labelled), the 500 ids outside the test set", "MIT",
        lambda data: _pubmed(data, test=False), lambda data: _pubmed(data, test=True),
    ),
    Domain(
        "shakespeare", 4, 130, "Tiny Shakespeare, first 90 %", "public domain",
        lambda data: _shakespeare(data, heldout=False),
        lambda data: _shakespeare(data, heldout=True),
    ),
    Domain(
        "science", 8, 130, "ARC easy, ARC challenge, OpenBookQA train splits, first 90 % of each",
        "CC BY-SA 4.0 (ARC), Apache-2.0 (OpenBookQA)",
        lambda data: _science(data, heldout=False), lambda data: _science(data, heldout=True),
    ),
    Domain(
        "reading", 8, 100, "BoolQ train split, first 90 % (questions and yes/no answers)",
        "CC BY-SA 3.0",
        lambda data: _reading(data, heldout=False), lambda data: _reading(data, heldout=True),
    ),
    Domain(
        "encyclopedia", 8, 100, "WikiText-2 validation split, sentences without <unk>",
        "CC BY-SA 3.0", lambda data: _wikitext(data, "valid"), lambda data: _wikitext(data, "test"),
    ),
)  # fmt: skip
