"""Answers in the terminal."""

from __future__ import annotations

from io import StringIO

from rich.console import Console

from expertmix.report.answers import AnswerView, answer, legend
from expertmix.report.palette import expert_colors

NAMES = ("maths", "python", "poetry")


def view(**changes) -> AnswerView:
    fields = {
        "title": "prompts.txt:1", "prompt": "how much\nis it", "pieces": (" it", " is", " 4[b]"),
        "first": (0, None, 2), "shares": (0.5, 0.0, 0.5),
    }  # fmt: skip
    return AnswerView(**{**fields, **changes})


def styles(text, word: str) -> list[str]:
    return [str(span.style) for span in text.spans if text.plain[span.start : span.end] == word]


def test_a_token_has_the_color_of_its_adapter():
    """One without has none; text is text, not markup."""
    shown = answer(view(), NAMES)
    colors = expert_colors(3)
    assert f"on {colors[0]}" in styles(shown, " it")[0]
    assert "on" not in styles(shown, " is")[0].split()
    assert f"on {colors[2]}" in styles(shown, " 4[b]")[0]
    assert (
        shown.plain
        == "prompts.txt:1\nhow much is it\n it is 4[b]\nmaths 50\u202f% · poetry 50\u202f%"
    )


def test_a_long_prompt_is_cut_at_its_start():
    """The answer goes on from its end."""
    shown = answer(view(prompt="word " * 100 + "the end"), NAMES)
    line = shown.plain.split("\n")[1]
    assert line.startswith("… ")
    assert line.endswith("the end")
    assert len(line) < 200


def test_an_empty_answer_says_so():
    """And has no shares."""
    shown = answer(view(pieces=(), first=(), shares=(0.0, 0.0, 0.0)), NAMES)
    assert shown.plain.endswith("(no answer: the model ended at once)")


def test_the_legend_has_the_largest_share_first():
    """Adapters without any are left out; ties and long lists are told."""
    shown = legend(NAMES, (0.25, 0.0, 0.75)).plain
    assert shown.index("poetry") < shown.index("maths")
    assert "python" not in shown
    assert "tie" in legend(NAMES, (0.5, 0.5, 0.0), ties=True).plain
    many = legend([f"a{n}" for n in range(40)], [1 / 40] * 40).plain
    assert "and 30 more" in many
    assert legend(NAMES, (0.0, 0.0, 0.0)).plain == "no adapter had any weight"


def test_no_name_of_the_legend_is_broken():
    """Lines end between names."""
    names = [f"adapter number {n}" for n in range(9)]
    console = Console(file=StringIO(), width=80)
    console.print(legend(names, [1 / 9] * 9))
    shown = console.file.getvalue()
    assert all(f" {name}  11" in shown for name in names)


def test_a_long_name_does_not_fill_the_screen():
    """It is cut; and control characters of any part are marks."""
    names = ("x" * 300, "a\x1b[0m", "b")
    shown = answer(view(prompt="p\x1b[1m", pieces=("\x07", "b", "c"), title="t\x9b"), names)
    assert all(len(line) < 120 for line in shown.plain.split("\n"))
    assert not set(shown.plain) & {"\x1b", "\x07", "\x9b"}
    assert "\x1b" not in legend(names, (0.2, 0.7, 0.1)).plain
