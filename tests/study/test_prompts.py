from __future__ import annotations

from pathlib import Path

import pytest

from expertmix.errors import ConfigError
from expertmix.study.prompts import Prompt, read_prompts


def _file(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_a_text_file_has_one_prompt_a_line(tmp_path):
    """Blank lines are skipped, but count: a prompt knows its line."""
    path = _file(tmp_path, "p.txt", "first\r\n\n  \n second\n")
    assert read_prompts(path) == (
        Prompt("first", None, "p.txt:1"),
        Prompt(" second", None, "p.txt:4"),
    )


def test_a_json_file_has_text_and_label(tmp_path):
    """`prompt` stands for `text`; a label may be left out."""
    path = _file(tmp_path, "p.jsonl", '{"text": "a\\nb", "label": "x"}\n{"prompt": "c"}\n')
    assert read_prompts(path) == (Prompt("a\nb", "x", "p.jsonl:1"), Prompt("c", None, "p.jsonl:2"))


def test_a_byte_order_mark_and_line_separators_are_no_trouble(tmp_path):
    """A file from Windows reads the same; U+2028 inside a text does not break a line."""
    path = _file(tmp_path, "p.jsonl", "\ufeff" + '{"text": "a\u2028b"}')
    assert read_prompts(path) == (Prompt("a\u2028b", None, "p.jsonl:1"),)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("p.txt", "", "holds no prompt"),
        ("p.txt", "\n  \n", "holds no prompt"),
        ("p.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("p.csv", "a,b", "neither .txt"),
        ("p.jsonl", '{"text": "a"}\n{"text": ', r"p\.jsonl:2: not JSON"),
        ("p.jsonl", "[" * 100_000, r"p\.jsonl:1: not JSON"),
        ("p.jsonl", '{"text": "a \\ud800"}', r"p\.jsonl:1: '\\ud800' is half a character"),
        ("p.jsonl", '{"text": "a", "label": "\\ud800"}', r"p\.jsonl:1: .* half a character"),
        ("p.jsonl", '["a"]', r"p\.jsonl:1: expected an object"),
        ("p.jsonl", '{"text": "a", "lable": "b"}', r"p\.jsonl:1: unknown key 'lable'"),
        ("p.jsonl", '{"label": "b"}', r"p\.jsonl:1: give `text` or `prompt`"),
        ("p.jsonl", '{"text": "a", "prompt": "b"}', r"p\.jsonl:1: .*both"),
        ("p.jsonl", '{"text": 3}', r"p\.jsonl:1: the text must be a string"),
        ("p.jsonl", '{"text": " "}', r"p\.jsonl:1: the text must be a string that is not blank"),
        ("p.jsonl", '{"text": "a", "label": 3}', r"p\.jsonl:1: the label must be a string"),
    ],
)
def test_a_wrong_file_is_told_with_its_line(tmp_path, name, content, says):
    """What, where, and what to do."""
    with pytest.raises(ConfigError, match=says):
        read_prompts(_file(tmp_path, name, content))


@pytest.mark.parametrize(
    ("path", "says"), [("none.txt", "there is no"), ("folder.txt", "cannot read")]
)
def test_a_file_that_cannot_be_read_is_told(tmp_path, path, says):
    """A missing file, or a folder of that name."""
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(ConfigError, match=says):
        read_prompts(tmp_path / path)
