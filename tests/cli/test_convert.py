from __future__ import annotations

import json

from study.conftest import everything


def test_a_conversion_can_be_looked_at(expertmix, dense, adapters, tmp_path):
    """What `convert` writes, `models` shows."""
    out = tmp_path / "moe"
    answer = expertmix("convert", dense, adapters, "--out", out, "--router", "random")
    assert (answer.code, answer.err) == (0, "")
    assert "3 experts, 2 per token: base, ada, bob" in answer.out
    sites = json.loads(expertmix("models", out, "--json").out)["sites"]
    assert {(site["experts"], site["top_k"]) for site in sites} == {(3, 2)}


def test_a_dry_run_writes_nothing(expertmix, dense, adapters, tmp_path):
    """It says what would be written."""
    args = ("convert", dense, adapters, "--out", tmp_path / "moe", "--router", "random")
    answer = expertmix(*args, "--dry-run")
    assert answer.code == 0
    assert "would write" in answer.out
    assert json.loads(expertmix(*args, "--dry-run", "--json").out)["experts"][0] == "base"
    assert everything(tmp_path) == []


def test_a_router_needs_texts(expertmix, dense, adapters, tmp_path):
    """Exit code 2, and how to give them."""
    answer = expertmix("convert", dense, adapters, "--out", tmp_path / "moe")
    assert answer.code == 2
    assert "give --texts FILE.jsonl" in answer.err
    assert everything(tmp_path) == []
