"""Rows of public sets as `Item`s: each layout says by which keys it is known.

Knows the keys of one row at a time; no file, no token and no model. The layouts of ARC, OpenBookQA,
PIQA, HellaSwag, Social IQa, CommonsenseQA, SciQ and MMLU are those of the hub. Options that stand
as letters inside the query (`Choices:`, `A. …`) are taken out, so that any style can show them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from expertmix.errors import ConfigError
from expertmix.study.choice import CUE, Item

Row = Mapping[str, Any]
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

_LISTED = re.compile(r"(.*?)\n(?:Choices:\n)?(A[.):] .*)\nAnswer:\s*", re.DOTALL)
_LETTERED = re.compile(r"^([A-Z])[.):] (.*)$", re.MULTILINE)
_NUMBERED = re.compile(r"(.*)\n\n(Answer1: .*)\n\nAnswer format: .*", re.DOTALL)
_INSTRUCTION = "Please choose the correct answer to the question: "
_TRUTH = "Please answer the following question with true or false, question: "
_EXTRAS = frozenset({"name", "label", "family", "id"})


@dataclass(frozen=True, slots=True)
class Layout:
    """How rows of one kind are read.

    Attributes:
        name: Of the layout, for messages.
        keys: Keys that a row must have.
        convert: A row and where it stands, as an item.
        closed: Refuse keys that are not known: rows that people write, where a key that is wrong
            is a typo. Rows of public sets have more keys than are needed.
    """

    name: str
    keys: frozenset[str]
    convert: Callable[[Row, str], Item]
    closed: bool = False

    def item(self, row: Row, where: str, name: str) -> Item:
        """One row as an item.

        Raises:
            ConfigError: A value is missing or of the wrong kind.
        """
        unknown = sorted(set(row) - self.keys - _EXTRAS) if self.closed else []
        if unknown:
            raise ConfigError(
                f"{where}: unknown key {unknown[0]!r}; known: {', '.join(sorted(self.keys))}, "
                f"name, label or family"
            )
        found = self.convert(row, where)
        own = row.get("name", row.get("id"))
        label = row.get("label", row.get("family")) if self.closed else row.get("subject")
        return Item(
            found.query, found.choices if found.free else _stripped(found.choices), found.gold,
            found.cue,
            name=name if own is None else str(own),
            label=None if label is None else str(label),
            where=where, free=found.free,
        )  # fmt: skip


def layout_of(row: Row, where: str) -> Layout:
    """The layout that a row has.

    Raises:
        ConfigError: None that is known.
    """
    for layout in LAYOUTS:
        if layout.keys <= set(row):
            return layout
    if "context_options" in row:
        raise ConfigError(
            f"{where}: options that stand before the scored text (winogrande) need a prompt for "
            f"each, and here all options of an item share one prompt: use another set"
        )
    raise ConfigError(
        f"{where}: no known layout has the keys {', '.join(sorted(row)) or 'of an empty row'}. "
        f"Write `query`, `choices` and `gold`, or `prompt` and `answer`."
    )


def _plain(row: Row, where: str) -> Item:
    query, choices, gold = _text(row, "query", where), row["choices"], row["gold"]
    if not isinstance(choices, Sequence) or isinstance(choices, str):
        raise ConfigError(f"{where}: `choices` must be a list of texts")
    if not all(isinstance(choice, str) for choice in choices):
        raise ConfigError(f"{where}: `choices` must be a list of texts")
    if isinstance(gold, bool) or not isinstance(gold, int):
        raise ConfigError(f"{where}: `gold` must be the number of a choice, from 0, not {gold!r}")
    listed = _LISTED.fullmatch(query)
    if listed and list(choices) == list(LETTERS[: len(choices)]):
        return Item(listed[1], _unlisted(listed[2], choices, where), gold, CUE)
    query, cue = _split_cue(query)
    return Item(query, tuple(choices), gold, cue)


def _unlisted(text: str, letters: Sequence[str], where: str) -> tuple[str, ...]:
    found = _LETTERED.findall(text)
    if [letter for letter, _ in found] != list(letters):
        raise ConfigError(f"{where}: the query lists other options than its choices {letters}")
    return tuple(choice for _, choice in found)


def _split_cue(query: str) -> tuple[str, str]:
    """`Answer:` at the end is a cue; what begins with `Question:` gets one."""
    bare = query.rstrip()
    if bare.endswith(CUE):
        return bare.removesuffix(CUE), CUE
    return (bare, CUE) if bare.startswith("Question:") else (query.rstrip(" "), "")


def _free(row: Row, where: str) -> Item:
    return Item(_text(row, "prompt", where), (_text(row, "answer", where),), 0, free=True)


def _arc(row: Row, where: str) -> Item:
    question = f"Question: {_text(row, 'question', where)}"
    return Item(question, *_keyed(row, where), cue=CUE)


def _openbook(row: Row, where: str) -> Item:
    return Item(_text(row, "question_stem", where), *_keyed(row, where))


def _keyed(row: Row, where: str) -> tuple[tuple[str, ...], int]:
    """`choices: {text: […], label: […]}` and `answerKey`."""
    choices = row["choices"]
    if not isinstance(choices, Mapping) or not {"text", "label"} <= set(choices):
        raise ConfigError(f"{where}: `choices` must have `text` and `label`, as on the hub")
    labels = [str(label) for label in choices["label"]]
    key = str(row["answerKey"])
    if key not in labels:
        raise ConfigError(
            f"{where}: answerKey {key!r} is not among {labels}; test splits without answers cannot "
            f"be used"
        )
    return tuple(str(text) for text in choices["text"]), labels.index(key)


def _piqa(row: Row, where: str) -> Item:
    return Item(
        f"Question: {_text(row, 'goal', where)}",
        (_text(row, "sol1", where), _text(row, "sol2", where)), _number(row, "label", where), CUE,
    )  # fmt: skip


def _hellaswag(row: Row, where: str) -> Item:
    activity = f"{row['activity_label']}: " if row.get("activity_label") else ""
    context = activity + _text(row, "ctx", where)
    endings = tuple(str(ending) for ending in row["endings"])
    return Item(context, endings, _number(row, "label", where))


def _siqa(row: Row, where: str) -> Item:
    query = f"Context: {_text(row, 'context', where)}\nQuestion: {_text(row, 'question', where)}"
    choices = tuple(_text(row, f"answer{letter}", where) for letter in "ABC")
    return Item(query, choices, _number(row, "label", where) - 1, CUE)


def _sciq(row: Row, where: str) -> Item:
    keys = ("correct_answer", "distractor1", "distractor2", "distractor3")
    choices = tuple(_text(row, key, where) for key in keys)
    turn = sum(map(ord, _text(row, "question", where))) % 4  # the set has the answer last, always
    turned = choices[-turn:] + choices[:-turn] if turn else choices
    return Item(f"Question: {row['question']}", turned, turn, CUE)


def _mmlu(row: Row, where: str) -> Item:
    choices = tuple(str(choice) for choice in row["choices"])
    return Item(f"Question: {_text(row, 'question', where)}", choices, _answer(row, where), CUE)


def _mmlu_csv(row: Row, where: str) -> Item:
    choices = tuple(_text(row, letter, where) for letter in "ABCD")
    return Item(f"Question: {_text(row, 'question', where)}", choices, _answer(row, where), CUE)


def _answer(row: Row, where: str) -> int:
    """A number from 0, or a letter."""
    answer = str(row["answer"]).strip()
    return LETTERS.index(answer) if len(answer) == 1 and answer in LETTERS else _number(
        row, "answer", where
    )  # fmt: skip


def _instruction(row: Row, where: str) -> Item:
    text, answer = _text(row, "instruction", where), str(row["answer"]).strip().lower()
    if text.startswith(_TRUTH):
        query = "Question: " + text.removeprefix(_TRUTH).partition("\n\nAnswer format:")[0]
        choices, known = ["true", "false"], ["true", "false"]
    else:
        found = _NUMBERED.fullmatch(text)
        if found is None:
            raise ConfigError(f"{where}: the instruction lists no options `Answer1: …`")
        query = "Question: " + found[1].removeprefix(_INSTRUCTION)
        choices = [one.strip() for one in re.split(r"\s*Answer\d+: ?", found[2])[1:]]
        known = [f"answer{number}" for number in range(1, len(choices) + 1)]
    if answer not in known:
        raise ConfigError(f"{where}: the answer {answer!r} is none of {', '.join(known)}")
    return Item(query, tuple(choices), known.index(answer), CUE)


def _stripped(choices: Sequence[str]) -> tuple[str, ...]:
    return tuple(choice.strip() for choice in choices)


def _text(row: Row, key: str, where: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{where}: `{key}` must be a text that is not blank, got {value!r}")
    return value


def _number(row: Row, key: str, where: str) -> int:
    try:
        return int(row[key])
    except (TypeError, ValueError) as problem:
        raise ConfigError(
            f"{where}: `{key}` must be the number of the right option, got {row[key]!r}"
        ) from problem


def _layout(
    name: str, keys: str, convert: Callable[[Row, str], Item], *, closed: bool = False
) -> Layout:
    return Layout(name, frozenset(keys.split()), convert, closed)


LAYOUTS = (
    _layout("choice", "query choices gold", _plain, closed=True),
    _layout("free text", "prompt answer", _free, closed=True),
    _layout("openbook_qa", "question_stem choices answerKey", _openbook),
    _layout("arc, commonsense_qa", "question choices answerKey", _arc),
    _layout("piqa", "goal sol1 sol2 label", _piqa),
    _layout("hellaswag", "ctx endings label", _hellaswag),
    _layout("siqa", "context question answerA answerB answerC label", _siqa),
    _layout("sciq", "question correct_answer distractor1 distractor2 distractor3", _sciq),
    _layout("mmlu", "question choices answer", _mmlu),
    _layout("mmlu csv", "question A B C D answer", _mmlu_csv),
    _layout("choice_train", "instruction answer", _instruction),
)
"""In the order in which they are tried."""
