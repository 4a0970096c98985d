"""PEFT is the judge: what it computes for one adapter, and for Arrow, is what we compute."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from expertmix.errors import CheckpointError
from expertmix.experts.composed import Composed
from expertmix.experts.shelf import Shelf
from expertmix.routers.arrow import Arrow
from expertmix.routers.fixed import Fixed
from expertmix.routers.oracle import Oracle
from expertmix.routers.spectr import SpectR

from .world import (
    calm,
    close,
    logits_of,
    peft_adapter,
    peft_model,
    state,
    tiny_llama,
)

NAMES = ("ada", "bob", "cyd", "dee")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("combination", ["outputs", "aligned"])
def test_a_shelf_of_one_is_peft_with_that_adapter(library: Path, name, combination):
    """k = 1 on a single adapter equals PEFT: rank 8, rsLoRA, mixed ranks, one layer only."""
    with Composed(
        tiny_llama(), Shelf.open(library / name), SpectR(top_k=1), combination=combination
    ) as composed:
        close(logits_of(composed.model), logits_of(peft_model(library / name)))


@pytest.mark.parametrize("name", [*NAMES, "eve"])
def test_fixed_is_peft_with_that_adapter_among_others(library: Path, name):
    """One adapter of a shelf of five, chosen everywhere, equals PEFT; also where it is absent."""
    with Composed(tiny_llama(), Shelf.open(library), Fixed(name)) as composed:
        close(logits_of(composed.model), logits_of(peft_model(library / name)))


def test_fixed_weights_are_pefts_weighted_adapter(tmp_path: Path):
    """Σ w_i B_i A_i equals PEFT's own weighted sum by concatenation ("cat")."""
    folders = [peft_adapter(tmp_path / name, seed) for seed, name in enumerate("ab")]
    model = peft_model(*folders)
    with calm():
        model.add_weighted_adapter(["a", "b"], [0.7, 0.4], "both", combination_type="cat")
        model.set_adapter("both")
    with Composed(tiny_llama(), Shelf.open(tmp_path), Fixed({"a": 0.7, "b": 0.4})) as composed:
        close(logits_of(composed.model), logits_of(model))


@pytest.mark.parametrize("name", NAMES)
def test_a_live_model_is_routed_in_place(library: Path, name):
    """On a PeftModel its own adapters rest, the shelf acts, and afterwards all is as it was."""
    model = peft_model(*[library / one for one in NAMES])
    before, expected = logits_of(model), logits_of(peft_model(library / name))
    was = state(model)
    with Composed(model, Shelf.from_peft(model), Fixed(name)) as composed:
        assert composed.sites[0].site.name == "model.layers.0.self_attn.q_proj"
        close(logits_of(model), expected)
    assert torch.equal(logits_of(model), before)
    assert state(model) == was


def test_a_live_model_with_merged_adapters_is_refused(library: Path):
    """On merged weights the base is not the base: refused, and nothing is changed."""
    model = peft_model(library / "ada")
    with calm():
        model.merge_adapter()
    before = logits_of(model)
    with pytest.raises(CheckpointError, match="'ada' is merged"):
        Composed(model, Shelf.open(library), SpectR())
    assert torch.equal(logits_of(model), before)


def clear_prototypes(folder: Path, seed: int) -> Path:
    """An adapter whose directions fall off fourfold, so that power iteration converges."""
    from safetensors.torch import load_file, save_file

    path = peft_adapter(folder, seed) / "adapter_model.safetensors"
    tensors = load_file(path)
    for key, value in tensors.items():
        if "lora_A" in key:
            orthogonal, _ = torch.linalg.qr(value.T)
            tensors[key] = orthogonal.T.contiguous()
        else:
            orthogonal, _ = torch.linalg.qr(value)
            tensors[key] = (orthogonal * torch.tensor([4.0, 1.0, 0.25, 0.06])).contiguous()
    save_file(tensors, path)
    return folder


def test_our_arrow_is_pefts_where_its_rules_agree(tmp_path: Path):
    """Same rank, same targets, prototypes that power iteration finds: the same logits."""
    from peft import ArrowConfig, create_arrow_model

    folders = [clear_prototypes(tmp_path / f"a{seed}", seed) for seed in range(4)]
    with calm():
        rival = create_arrow_model(
            tiny_llama(), [str(folder) for folder in folders],
            ArrowConfig(top_k=2, router_temperature=0.7),
        ).train(False)  # fmt: skip
    with Composed(tiny_llama(), Shelf.open(tmp_path), Arrow(2, 0.7)) as composed:
        close(logits_of(composed.model), logits_of(rival))


def test_conv1d_models(tmp_path: Path):
    """GPT-2's transposed Conv1D is a linear module like any other."""
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    def gpt2():
        torch.manual_seed(0)
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=32, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1,
                eos_token_id=2,
            )
        ).train(False)  # fmt: skip

    with calm():
        config = LoraConfig(
            r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, init_lora_weights=False
        )
        rival = get_peft_model(gpt2(), config).train(False)
        rival.save_pretrained(tmp_path / "one")
    with Composed(gpt2(), Shelf.open(tmp_path), SpectR(top_k=1)) as composed:
        close(logits_of(composed.model), logits_of(rival))


def test_dropout_is_off(tmp_path: Path):
    """An adapter trained with dropout is applied without it, as PEFT does in evaluation."""
    folder = peft_adapter(tmp_path / "one", 1, lora_dropout=0.5)
    with Composed(tiny_llama(), Shelf.open(folder), SpectR(top_k=1)) as composed:
        close(logits_of(composed.model), logits_of(peft_model(folder)))
        assert torch.equal(logits_of(composed.model), logits_of(composed.model))


def test_the_oracle_routes_rows(library: Path):
    """Each row of a batch gets the logits of PEFT with its own adapter, in decoding too."""
    with Composed(tiny_llama(), Shelf.open(library), Oracle(("bob", "ada"))) as composed:
        found = logits_of(composed.model)
    for row, name in enumerate(("bob", "ada")):
        close(found[row], logits_of(peft_model(library / name))[row])
