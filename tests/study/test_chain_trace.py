"""Tracing a chain: sizes of updates and retention stand in the results and on the page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from expertmix.models.coe import CoeConfig, CoeForCausalLM
from expertmix.study.trace_job import TraceJob, run_trace
from expertmix.testing import tiny_tokenizer


@pytest.fixture(scope="module")
def chain_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny chain with a tokenizer."""
    folder = tmp_path_factory.mktemp("chain")
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = CoeConfig(
        vocab_size=len(tokenizer), hidden_size=16, moe_intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=2, num_experts=4, num_experts_per_tok=2, num_iterations=2,
    )  # fmt: skip
    CoeForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_chain_is_traced(chain_folder: Path, tmp_path: Path) -> None:
    """results.json has retention against chance and sizes, the page has the section."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"the {word} is a {word}\n" for word in "abcdefgh"))
    done = run_trace(TraceJob(model=str(chain_folder), prompts=prompts, out=tmp_path / "out"))
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [one["layer"] for one in content["chains"]] == [
        "model.layers.0.mlp", "model.layers.1.mlp",
    ]  # fmt: skip
    first = content["chains"][0]
    assert first["passages"][0]["chance"] == 0.5
    assert 0 <= first["passages"][0]["retention"]["value"] <= 1
    assert len(first["update_size"]) == 2
    assert all(size["low"] <= size["value"] <= size["high"] for size in first["update_size"])
    assert 'id="chains"' in (tmp_path / "out" / "report.html").read_text()
    assert done.tables[-1].title == "From iteration to iteration"
