from __future__ import annotations

from pathlib import Path

import pytest
import torch

from expertmix.errors import CheckpointError
from expertmix.experts.peft_folder import read_adapter
from expertmix.experts.peft_live import read_live

from .world import calm, peft_adapter, peft_model, tiny_llama


def test_a_live_model_has_the_adapters_of_its_folders(library: Path):
    """The same modules, factors and scales, in the order of loading."""
    names = ["cyd", "ada", "bob", "dee", "eve"]
    live = read_live(peft_model(*[library / name for name in names]))
    assert [adapter.name for adapter in live] == names
    for adapter in live:
        stored = read_adapter(library / adapter.name)
        assert adapter.digest == stored.digest


def test_scales_are_those_that_are_set(library: Path):
    """A scale that was changed on the live model counts."""
    model = peft_model(library / "ada")
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    layer.set_scale("ada", 0.5)
    factors = read_live(model)[0].factors["model.layers.0.mlp.up_proj"]
    assert factors.scale == pytest.approx(0.5 * 16 / 8)


def test_merged_adapters_are_refused(library: Path):
    """Merged adapters cannot be routed."""
    model = peft_model(library / "ada")
    with calm():
        model.merge_adapter()
    with pytest.raises(CheckpointError, match=r"'ada' is merged.*unmerge_adapter"):
        read_live(model)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "whole modules"),
        ({"target_modules": ["embed_tokens"]}, r"module '\S*embed_tokens'.*embedding"),
    ],
)
def test_what_is_not_a_plain_lora_is_refused(tmp_path: Path, config, words):
    """DoRA, biases, saved modules and embeddings are refused by name, never ignored."""
    model = peft_model(peft_adapter(tmp_path / "odd", 1, **config))
    with pytest.raises(CheckpointError, match=f"'odd'.*{words}"):
        read_live(model)


def test_a_plain_model_has_no_adapters():
    """A model without PEFT is refused."""
    with pytest.raises(CheckpointError, match="no PeftModel"):
        read_live(tiny_llama())


def test_reading_changes_nothing(library: Path):
    """The live model computes what it did before."""
    model = peft_model(library / "ada", library / "bob")
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        before = model(ids).logits
        read_live(model)
        assert torch.equal(model(ids).logits, before)
