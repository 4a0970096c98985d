from __future__ import annotations

from pathlib import Path

import pytest

from .world import peft_adapter


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five adapters by PEFT: rank 8, rsLoRA, patterns, one layer only, and one untrained."""
    root = tmp_path_factory.mktemp("library")
    peft_adapter(root / "ada", 1, r=8, lora_alpha=16)
    peft_adapter(root / "bob", 2, r=3, use_rslora=True, target_modules=["q_proj", "v_proj"])
    peft_adapter(
        root / "cyd", 3,
        rank_pattern={"up_proj": 2}, alpha_pattern={r"layers\.1\.mlp\.down_proj": 5},
    )  # fmt: skip
    peft_adapter(root / "dee", 4, layers_to_transform=[1], target_modules=["up_proj"])
    peft_adapter(root / "eve", 5, init_lora_weights=True)  # B = 0
    return root
