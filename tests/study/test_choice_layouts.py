from __future__ import annotations

import pytest

from expertmix.errors import ConfigError
from expertmix.study.choice_layouts import LAYOUTS, layout_of

KEYED = {"text": ["sun ", "moon"], "label": ["A", "B"]}
HUB = [
    ({"id": "7", "question": "Hot?", "choices": KEYED, "answerKey": "B"}, "Question: Hot?", 1),
    ({"question_stem": "Hot is the", "choices": KEYED, "answerKey": "A"}, "Hot is the", 0),
    ({"goal": "Heat", "sol1": "sun", "sol2": "moon", "label": 1}, "Question: Heat", 1),
    ({"ctx": "It is", "endings": ["sun", "moon"], "label": "1"}, "It is", 1),
    (
        {"ctx": "It is", "endings": ["sun", "moon"], "label": "0", "activity_label": "Heat"},
        "Heat: It is",
        0,
    ),
    (
        {
            "context": "C.", "question": "Q?", "answerA": "sun", "answerB": "moon",
            "answerC": "sky", "label": "2",
        },
        "Context: C.\nQuestion: Q?",
        1,
    ),
    (
        {"question": "Q?", "choices": ["sun", "moon"], "answer": 1, "subject": "s"},
        "Question: Q?",
        1,
    ),
    (
        {"question": "Q?", "A": "sun", "B": "moon", "C": "x", "D": "y", "answer": "B"},
        "Question: Q?",
        1,
    ),
    (
        {"instruction": "Please choose the correct answer to the question: Q?\n\nAnswer1: sun "
                        "Answer2: moon\n\nAnswer format: answer1/answer2", "answer": "answer2"},
        "Question: Q?",
        1,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("row", "query", "gold"), HUB)
def test_rows_of_public_sets_are_known_by_their_keys(row, query, gold):
    """Query, options without blanks around them, and the right one."""
    item = layout_of(row, "x:1").item(row, "x:1", "x-1")
    assert item.query == query
    assert item.choices[:2] == ("sun", "moon")
    assert item.gold == gold
    assert item.name == row.get("id", "x-1")
    assert item.label == row.get("subject")
    assert item.cue == ("\nAnswer:" if query.startswith(("Question", "Context")) else "")


def test_the_answer_of_a_set_that_has_it_last_moves():
    """SciQ lists the right answer apart: its place must not say that it is right."""
    golds = set()
    for number in range(20):
        row = {
            "question": f"Q{number}?", "correct_answer": "right", "distractor1": "a",
            "distractor2": "b", "distractor3": "c",
        }  # fmt: skip
        item = layout_of(row, "x:1").item(row, "x:1", "x")
        assert item.choices[item.gold] == "right"
        assert sorted(item.choices) == ["a", "b", "c", "right"]
        golds.add(item.gold)
    assert golds == {0, 1, 2, 3}


@pytest.mark.parametrize("cued", ["Question: Q?", "Question: Q?\n", "Question: Q?\nAnswer:"])
def test_a_cue_is_added_once(cued):
    """What begins with `Question:` ends with `Answer:`, whether or not it did."""
    row = {"query": cued, "choices": ["a", "b"], "gold": 0}
    assert layout_of(row, "x").item(row, "x", "x").prompt == "Question: Q?\nAnswer:"


def test_a_begun_text_is_gone_on_with():
    """No cue where a query is no question; labels and names of own rows are kept."""
    row = {"query": "It rained, so", "choices": ["a", "b"], "gold": 0, "family": "f", "name": "n"}
    item = layout_of(row, "x").item(row, "x", "x")
    assert (item.prompt, item.label, item.name) == ("It rained, so", "f", "n")


@pytest.mark.parametrize(
    "row",
    [
        {"question": "Q", "choices": KEYED, "answerKey": ""},
        {"question": "Q", "choices": ["a"], "answerKey": "A"},
        {"ctx": "It is", "endings": ["sun", "moon"], "label": ""},
        {"goal": "Heat", "sol1": "sun", "sol2": None, "label": 1},
        {"instruction": "What?", "answer": "answer1"},
        {"query": "Q\nChoices:\nA. a\nAnswer:", "choices": ["A", "B"], "gold": 0},
        {
            "instruction": "Please choose the correct answer to the question: Q?\n\nAnswer1: sun "
            "Answer2: moon\n\nAnswer format: answer1/answer2",
            "answer": "answer3",
        },
    ],
)
def test_rows_without_an_answer_are_refused(row):
    """Splits that hide their answers, and texts that are not there."""
    with pytest.raises(ConfigError, match=r"^x:1: "):
        layout_of(row, "x:1").item(row, "x:1", "x")


def test_no_layout_hides_another():
    """Rows that have just a layout's keys are read by it."""
    for layout in LAYOUTS:
        assert layout_of(dict.fromkeys(layout.keys), "x") is layout
