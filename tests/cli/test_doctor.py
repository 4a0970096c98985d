from __future__ import annotations

import json


def test_a_healthy_house(expertmix):
    """This very environment has no problem, or says which."""
    answer = expertmix("doctor")
    found = json.loads(expertmix("doctor", "--json").out)
    assert answer.code == (1 if found["verdict"] == "problem" else 0)
    assert f"verdict: {found['verdict']}" in answer.out
    assert {check["name"] for check in found["checks"]} >= {"Python", "torch", "cache folder"}


def test_a_problem_is_exit_code_one(expertmix, monkeypatch, locked):
    """A cache folder that cannot be written, say."""
    monkeypatch.setenv("EXPERTMIX_CACHE", str(locked / "cache"))
    answer = expertmix("doctor")
    assert answer.code == 1
    assert "EXPERTMIX_CACHE" in answer.out
