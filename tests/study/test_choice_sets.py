from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from expertmix.errors import ConfigError
from expertmix.study import choice_sets
from expertmix.study.choice_sets import SETS, open_items

from .choosing import lines, questions


def test_a_file_is_a_file_whatever_its_name(tmp_path, monkeypatch):
    """Also where a public set has that name."""
    path = lines(tmp_path / "task.jsonl", questions(2))
    assert len(open_items(path)) == 2
    monkeypatch.chdir(tmp_path)
    path.rename("piqa")
    with pytest.raises(ConfigError, match="is neither"):
        open_items("piqa")


@pytest.mark.parametrize(("name", "split"), [("piqa", "validation"), ("piqa:train", "train")])
def test_a_public_set_is_read_from_the_hubs_parquet(tmp_path, monkeypatch, name, split):
    """A set by name, its split with answers by default; items are named after both."""
    asked = []
    row = {"goal": "Heat", "sol1": "sun", "sol2": "moon", "label": 0}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "0000.parquet")

    def fetch(repo, file, *, repo_type, revision):
        asked.append((repo, file, repo_type, revision))
        return str(tmp_path / "0000.parquet")

    monkeypatch.setattr(choice_sets, "hf_hub_download", fetch)
    (item,) = open_items(name)
    where = (SETS["piqa"].repo, f"plain_text/{split}/0000.parquet")
    assert asked == [(*where, "dataset", "refs/convert/parquet")]
    assert (item.name, item.choices) == (f"piqa-{split}-1", ("sun", "moon"))


def test_without_a_network_it_is_told(tmp_path, monkeypatch):
    """With what to do instead."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="cannot fetch arc_easy"):
        open_items("arc_easy")


@pytest.mark.parametrize("source", ["arc_hard", ""])
def test_an_unknown_name_lists_the_known_ones(source, tmp_path, monkeypatch):
    """A folder is no file of questions."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"known: arc_challenge, arc_easy|is a folder"):
        open_items(source)
