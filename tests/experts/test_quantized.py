"""Quantized bases, as bitsandbytes makes them; on any processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import expertmix as em
from expertmix.testing import tiny_adapters

from .world import ALL, IDS, calm, close, logits_of, tiny_llama

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

FOUR = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_compute_dtype": torch.float32,
}
EIGHT = {"load_in_8bit": True}


@pytest.fixture(params=[FOUR, EIGHT], ids=["4bit", "8bit"])
def quantized(request, tmp_path: Path) -> Any:
    base = tiny_llama(hidden_size=64, intermediate_size=128)
    tiny_adapters(tmp_path / "library", base, ("ada", "bob", "cyd", "dee"), targets=ALL)
    base.save_pretrained(tmp_path / "model")
    with calm():
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", quantization_config=BitsAndBytesConfig(**request.param)
        ).eval()


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_a_quantized_base(quantized: Any, tmp_path: Path):
    """One adapter gives PEFT's logits on the same quantized base; afterwards the base is itself."""
    from peft import PeftModel

    with calm():
        rival = PeftModel.from_pretrained(quantized, str(tmp_path / "library" / "ada")).eval()
    expected = logits_of(rival)
    base = rival.unload()  # only now: on a CPU, PEFT's loading changes how bitsandbytes multiplies
    plain = logits_of(base)
    em.compose(base, tmp_path / "library", {"kind": "fixed", "weights": {"ada": 1.0}})
    close(logits_of(base), expected)
    em.Composed.of(base).uninstall()
    assert torch.equal(logits_of(base), plain)


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_the_default_router_on_a_quantized_base(quantized: Any, tmp_path: Path):
    """It is calibrated, generates and is recorded."""
    em.compose(quantized, tmp_path / "library")
    with em.record(quantized) as trace:
        quantized.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=3)
    assert len(trace.sites) == 14
