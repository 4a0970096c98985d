"""The rules of the house, as tests."""

from __future__ import annotations

import subprocess
import sys

import pytest

import expertmix

CONTENTS = [
    "Ablate", "Composed", "Decision", "ExpertmixError", "InOrder", "Intervention", "Mask",
    "Question", "ReferenceSet", "Replay", "Reweight", "Sample", "Shelf", "Site", "SiteInfo",
    "Stage", "Trace", "compose", "from_json", "record", "references", "remix", "sites",
]  # fmt: skip


def test_the_table_of_contents_is_pinned():
    """Public names change on purpose only; every one of them loads; there are at most 25."""
    assert expertmix.__all__ == CONTENTS
    assert len(CONTENTS) <= 25
    for name in CONTENTS:
        assert getattr(expertmix, name).__module__.startswith("expertmix.")


def test_import_is_light():
    """`import expertmix` imports neither torch nor anything else that is heavy."""
    code = (
        "import sys, expertmix; heavy = ('torch', 'transformers', 'pyarrow');"
        "print([name for name in heavy if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_an_unknown_name_is_an_attribute_error():
    """A typo is told at once."""
    with pytest.raises(AttributeError, match="Abalte"):
        expertmix.Abalte  # noqa: B018
