"""Pages tell the truth: their code runs, top to bottom, as a reader would run it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from expertmix.testing import tiny_adapters, tiny_lm, tiny_moe

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", ["README.md", "docs/all-of-expertmix.md"])
def test_code_on_pages_runs(page, tmp_path, monkeypatch):
    """Every Python block that is not marked as planned runs, in order, in one session."""
    monkeypatch.chdir(tmp_path)
    ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(0))
    base = tiny_lm("llama")
    tiny_adapters(tmp_path / "adapters", base, ("code", "law", "medicine", "poetry", "sport"))
    session = {
        "model": tiny_moe("olmoe"),
        "base": base,
        "inputs": {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
    }
    blocks = BLOCK.findall((ROOT / page).read_text())
    assert blocks
    for block in blocks:
        exec(compile(block, page, "exec"), session)


LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")


@pytest.mark.parametrize(
    "page",
    sorted(
        str(path.relative_to(ROOT)) for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
    ),
)
def test_links_lead_somewhere(page):
    """A relative link on a page names a file of the project."""
    path = ROOT / page
    for target in LINK.findall(path.read_text()):
        assert (path.parent / target).exists(), target
