from __future__ import annotations

import json

import pytest
from study.conftest import everything


@pytest.fixture
def trace(expertmix, moe, prompts, tmp_path):
    expertmix("trace", moe, "--prompts", prompts, "--out", tmp_path / "run", "--no-report")
    return tmp_path / "run" / "trace.parquet"


def test_a_trace_becomes_a_page(expertmix, trace, tmp_path):
    """With the heading that was asked for."""
    page = tmp_path / "page.html"
    answer = expertmix("report", trace, "--out", page, "--title", "Mine & yours")
    assert (answer.code, answer.err) == (0, "")
    assert "Mine &amp; yours" in page.read_text()
    assert json.loads(expertmix("report", trace, "--out", page, "--json").out) == {
        "command": "report", "files": ["page.html"], "tokens": 58,
    }  # fmt: skip


def test_a_truncated_trace_is_told(expertmix, trace, tmp_path):
    """Exit code 2, no page."""
    trace.write_bytes(trace.read_bytes()[:-100])
    before = everything(tmp_path)
    answer = expertmix("report", trace, "--out", tmp_path / "page.html")
    assert answer.code == 2
    assert "trace.parquet" in answer.err
    assert everything(tmp_path) == before


def test_a_page_that_cannot_be_written_is_told(expertmix, trace, tmp_path):
    """A file where its folder should be, or a folder in the way."""
    (tmp_path / "page.html").mkdir()
    for out in (trace / "page.html", tmp_path / "page.html"):
        answer = expertmix("report", trace, "--out", out)
        assert answer.code == 2
        assert "cannot write" in answer.err
