from __future__ import annotations

import json

import pytest
from study.conftest import everything

from expertmix.study import demo


@pytest.fixture
def tiny(monkeypatch, dense, moe):
    """The demo on tiny models: its default names mean them."""
    names = {"default": str(dense), "default-moe": str(moe)}
    load_model, load_tokenizer = demo.load_model, demo.load_tokenizer
    monkeypatch.setattr(demo, "load_model", lambda name, **rest: load_model(names[name], **rest))
    monkeypatch.setattr(demo, "load_tokenizer", lambda name: load_tokenizer(names[name]))


@pytest.mark.usefixtures("tiny")
def test_a_demo_shows_tables_and_where_to_look(expertmix, tmp_path):
    """Who is called and what is lost stand apart."""
    answer = expertmix("demo", "--quick", "--out", tmp_path / "out")
    assert (answer.code, answer.err) == (0, "")
    for part in ("Who is called", "Loss by domain", "What is lost without each expert"):
        assert part in answer.out
    assert "Called often does not mean needed" in answer.out
    assert "Quick run" in answer.out
    for name in demo.FILES:
        assert name in answer.out
        assert (tmp_path / "out" / name).is_file()


@pytest.mark.usefixtures("tiny")
def test_a_demo_as_json(expertmix, tmp_path):
    """The content of results.json, and nothing else."""
    answer = expertmix("demo", "--quick", "--out", tmp_path, "--json")
    assert json.loads(answer.out) == json.loads((tmp_path / "results.json").read_text())


def test_a_path_in_the_way_is_told_before_any_work(expertmix, tmp_path):
    """Not after minutes."""
    (tmp_path / "file").write_text("")
    answer = expertmix("demo", "--out", tmp_path / "file")
    assert answer.code == 2
    assert "is a file" in answer.err
    assert everything(tmp_path) == ["file"]
