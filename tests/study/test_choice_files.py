from __future__ import annotations

import bz2
import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from expertmix.errors import ConfigError
from expertmix.study.choice import sift
from expertmix.study.choice_files import read_items

from .choosing import data, lines, questions


def test_every_format_holds_the_same_items(tmp_path):
    """.jsonl, .json, .csv, .parquet and compressed files give the same questions."""
    rows = questions(4)
    first = read_items(lines(tmp_path / "a.jsonl", rows))
    raw = (tmp_path / "a.jsonl").read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(raw))
    (tmp_path / "a.jsonl.bz2").write_bytes(bz2.compress(raw))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    quoted = [json.dumps(row["choices"]).replace('"', '""') for row in rows]
    table = [f'{row["query"]},"{q}",{row["gold"]}' for row, q in zip(rows, quoted, strict=True)]
    (tmp_path / "a.csv").write_text("\n".join(["query,choices,gold", *table]))
    for name in ("a.jsonl.gz", "a.jsonl.bz2", "a.json", "a.parquet", "a.csv"):
        found = read_items(tmp_path / name)
        assert [(i.query, i.cue, i.choices, i.gold) for i in found] == [
            (i.query, i.cue, i.choices, i.gold) for i in first
        ]
        assert found[2].name == "a-3"
        assert found[2].where == f"{name}:3"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "holds no item"),
        ("{", "a.jsonl:1: not JSON"),
        ("[1]", "expected an object"),
        ('{"question": "a"}', "no known layout has the keys question"),
        ('{"query": "a", "choices": ["b", "c"], "gold": "0"}', "`gold` must be the number"),
        ('{"query": "a", "choices": ["b", "c"], "gold": true}', "`gold` must be the number"),
        ('{"query": "a", "choices": "b", "gold": 0}', "must be a list of texts"),
        ('{"query": "a", "choices": [1, 2], "gold": 0}', "must be a list of texts"),
        ('{"query": " ", "choices": ["b", "c"], "gold": 0}', "`query` must be a text"),
        ('{"query": "a", "choices": ["b", "c"], "gold": 0, "glod": 1}', "unknown key 'glod'"),
        ('{"context_options": ["a"], "continuation": "b", "gold": 0}', "winogrande"),
    ],
)
def test_a_wrong_line_is_told_with_its_place(tmp_path, content, said):
    """What is wrong, and in which line of which file."""
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(ConfigError, match=said):
        read_items(path)


def test_files_of_the_wrong_kind_are_refused(tmp_path):
    """Missing, of an unknown ending, not UTF-8, not the format that their name says."""
    with pytest.raises(ConfigError, match="there is no file"):
        read_items(tmp_path / "a.jsonl")
    for name in ("a.yaml", "a.jsonl", "a.gz", "a.jsonl.bz2", "a.parquet", "a.txt", "a.csv"):
        (tmp_path / name).write_bytes(b'\xff\x00\n1,"\n')
        with pytest.raises(ConfigError):
            read_items(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "items", "left", "options"),
    [
        ("choice/arc_easy.jsonl", 2376, 7, {4}),
        ("choice/piqa.jsonl", 1838, 0, {2}),
        ("choice/siqa.jsonl", 1954, 13, {2}),
        ("choice/commonsense_qa.jsonl", 1221, 12, {4}),
        ("choice/openbook_qa.jsonl", 500, 0, {4}),
        ("choice_train/openbook_qa.json", 4957, 8, {4}),
        ("choice_train/boolq.json", 9427, 0, {2}),
        ("hellaswag/hellaswag_val_full.txt.bz2", 10042, 0, {4}),
    ],
)
def test_public_sets_are_read_whole(name, items, left, options):
    """Every row of the sets in the data folder is an item; what is left out is known."""
    found = read_items(data(name))
    kept, out = sift(found)
    assert (len(found), len(out)) == (items, left)
    assert {len(item.choices) for item in kept} == options
    assert not any("\n" in choice or choice != choice.strip() for i in kept for choice in i.choices)


def test_lettered_sets_give_their_texts():
    """siqa and commonsense_qa list their options inside the query: they are taken out of it."""
    first = read_items(data("choice/siqa.jsonl"))[0]
    assert first.choices == ("make a new plan", "Find somewhere to go")
    assert first.query.endswith("\nQuestion: What does Tracy need to do before this?")
    assert first.cue == "\nAnswer:"
