from __future__ import annotations

import json

import pytest
from study.conftest import everything, saved


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


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A MoE without a sliding window."""
    folder = tmp_path_factory.mktemp("models") / "moe"
    return saved(folder, "mixtral", num_local_experts=5, sliding_window=None)


def test_a_moe_becomes_a_chain_and_a_moe_again(expertmix, full, tmp_path):
    """Both are told in a line, and the chain can be looked at."""
    chain, back = tmp_path / "coe", tmp_path / "back"
    answer = expertmix("convert", full, "--to", "coe", "--out", chain)
    assert (answer.code, answer.err) == (0, "")
    assert "1 added iteration at scale 0: same logits" in answer.out
    assert expertmix("models", chain).code == 0
    answer = expertmix("convert", chain, "--out", back, "--json")
    assert json.loads(answer.out)["to"] == "moe"
    assert (back / "config.json").read_text() == (full / "config.json").read_text()


def test_a_chain_can_be_planned(expertmix, full, tmp_path):
    """A dry run writes nothing."""
    args = ("convert", full, "--to", "coe", "--iterations", "3", "--out", tmp_path / "coe")
    assert json.loads(expertmix(*args, "--dry-run", "--json").out)["iterations"] == 3
    assert everything(tmp_path) == []


def test_a_window_is_told(expertmix, moe, tmp_path):
    """A chain has none, and would not compute the same."""
    answer = expertmix("convert", moe, "--to", "coe", "--out", tmp_path / "coe")
    assert answer.code == 2
    assert "a sliding window of 16 tokens" in answer.err


def test_a_chain_needs_no_library(expertmix, moe, adapters, tmp_path):
    """And says what to do instead."""
    answer = expertmix("convert", moe, adapters, "--to", "coe", "--out", tmp_path / "coe")
    assert answer.code == 2
    assert "make the MoE first" in answer.err
