from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from expertmix.errors import ConfigError
from expertmix.study.train_texts import Document, normalized, read_documents, repeated, split


def read(path: Path, column: str = "text", unit: str = "paragraphs") -> list[tuple[str, str]]:
    return [(one.text, one.where) for one in read_documents([path], column, unit)]


def test_each_kind_of_file_gives_the_same_documents(tmp_path: Path) -> None:
    """With the line, or row, where each begins."""
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two\\nlines", "more": 1}\n')
    (tmp_path / "a.csv").write_text('text,more\none,1\n"two\nlines",2\n')
    (tmp_path / "a.txt").write_text("one\n\n\ntwo\nlines\n")
    pq.write_table(pa.table({"text": ["one", "two\nlines"]}), tmp_path / "a.parquet")
    places = {"jsonl": (1, 3), "csv": (2, 4), "txt": (1, 4), "parquet": (1, 2)}
    for kind, (first, second) in places.items():
        found = read(tmp_path / f"a.{kind}")
        assert found == [
            ("one", f"a.{kind}:{first}"), ("two\nlines", f"a.{kind}:{second}")
        ], kind  # fmt: skip


def test_a_unit_says_what_a_document_of_a_text_file_is(tmp_path: Path) -> None:
    """Paragraphs, lines, or all of it."""
    path = tmp_path / "a.txt"
    path.write_text("a\nb\n\nc\n")
    assert [text for text, _ in read(path)] == ["a\nb", "c"]
    assert read(path, unit="lines") == [("a", "a.txt:1"), ("b", "a.txt:2"), ("c", "a.txt:4")]
    assert read(path, unit="file") == [("a\nb\n\nc\n", "a.txt:1")]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": "  "}', "a.jsonl:2: the text is empty"),
        ("a.jsonl", '{"text": "a"}\n{"text": 3}', "a.jsonl:2: the text is no text but 3"),
        ("a.jsonl", '{"text": "a"}\n{"text": null}', "a.jsonl:2: the text is no text but None"),
        ("a.jsonl", '{"txt": "a"}', "a.jsonl:1: no column 'text'; there are txt"),
        ("a.jsonl", "{", "a.jsonl:1: not JSON"),
        ("a.jsonl", "[1]", "a.jsonl:1: expected an object"),
        ("a.jsonl", '{"text": "\\ud800"}', "half a character"),
        ("a.csv", "text,b\na,1\n,2\n", "a.csv:3: the text is empty"),
        ("a.csv", "b\n1\n", "no column 'text'"),
        ("a.csv", 'text\n"a\n', "not CSV"),
        ("a.csv", "text\n", "holds no text"),
        ("a.txt", " \n\n", "holds no text"),
        ("a.parquet", "nothing", "cannot read"),
        ("a.pdf", "", "neither .jsonl"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, name: str, content: str, said: str) -> None:
    """File, line and reason."""
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=said):
        read(tmp_path / name)


def test_a_bad_parquet_row_or_column_is_named(tmp_path: Path) -> None:
    """By its number; a missing column with those that are there."""
    pq.write_table(pa.table({"text": ["a", None], "n": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"a.parquet:2: the text is no text but None"):
        read(tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"a.parquet:1: the text is no text but 1"):
        read(tmp_path / "a.parquet", column="n")
    with pytest.raises(ConfigError, match="no column 'body'; there are text, n"):
        read(tmp_path / "a.parquet", column="body")


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "parquet"])
def test_a_missing_file_is_told(tmp_path: Path, kind: str) -> None:
    """By its name."""
    with pytest.raises(ConfigError, match=f"there is no file .*none.{kind}"):
        read(tmp_path / f"none.{kind}")


def test_a_split_is_drawn_with_the_seed_and_leaves_no_twin_behind() -> None:
    """The same seed splits the same way; equal documents are on one side; nothing is lost."""
    documents = [Document(f"text {n % 10}", f"a:{n}") for n in range(30)]
    training, validation = split(documents, 0.2, 1)
    assert (training, validation) == split(documents, 0.2, 1)
    assert validation != split(documents, 0.2, 2)[1]
    assert len({one.text for one in validation}) == 2
    assert not repeated(training, validation)
    assert sorted(one.where for one in [*training, *validation]) == sorted(
        one.where for one in documents
    )
    with pytest.raises(ConfigError, match="leaves none to train on"):
        split(documents[:1], 0.5, 0)


def test_repeated_texts_are_found_up_to_case_marks_and_spaces() -> None:
    """Exact match after normalization."""
    training = [Document("A  cat, sat.", "a:1")]
    validation = [Document("a cat sat", "b:1"), Document("a cat stood", "b:2")]
    assert [one.where for one in repeated(training, validation)] == ["b:1"]
    assert normalized("!?") == "!?"
