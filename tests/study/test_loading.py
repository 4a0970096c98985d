from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import expertmix as em
from expertmix.errors import (
    CheckpointError,
    ConfigError,
    NoSitesError,
    UnsupportedModelError,
)
from expertmix.study.loading import load_model, load_tokenizer, locate, outline


@pytest.fixture
def copy(moe: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(moe, tmp_path / "copy"))


def test_a_folder_becomes_a_model(moe):
    """In evaluation mode, in the type it is stored in or the one asked for."""
    model = load_model(str(moe), device="cpu")
    assert not model.training
    assert model.dtype == torch.float32
    assert load_model(str(moe), dtype="bfloat16").dtype == torch.bfloat16
    assert load_tokenizer(str(moe))("ab")["input_ids"]


def test_an_outline_needs_no_weights(copy):
    """Sites, names and context come from the config alone."""
    (copy / "model.safetensors").write_bytes(b"not read")
    found = outline(str(copy))
    assert len(found.sites) == 4
    assert found.sites[0].num_experts == 9
    assert found.sites[0].expert_name(3) == "python"
    assert found.context == 128
    assert found.architecture == "MixtralForCausalLM"


def test_a_dense_model_has_no_outline(dense):
    """It says that it is dense."""
    with pytest.raises(NoSitesError, match="dense"):
        outline(str(dense))


def test_pickled_weights_are_refused(pickled):
    """Why, and how to convert them."""
    with pytest.raises(CheckpointError, match=r"pickled.*can run any code.*save_pretrained"):
        load_model(str(pickled))
    with pytest.raises(CheckpointError, match="pickled"):
        outline(str(pickled))


def test_safetensors_win_over_pickles_beside_them(copy):
    """The pickle is not read."""
    (copy / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    assert load_model(str(copy))


@pytest.mark.parametrize("name", ["./nothing", "/nothing/here", "no/such/model", "~/nothing"])
def test_a_missing_folder_is_told(name):
    """With what could be given instead."""
    with pytest.raises(CheckpointError, match=r"there is no model folder.*default-moe"):
        locate(name)


def test_a_hub_id_out_of_reach_is_told():
    """Offline, for example."""
    with pytest.raises(CheckpointError, match=r"nobody/nothing cannot be loaded"):
        load_model("nobody/nothing")


def test_a_folder_without_a_model_is_told(tmp_path):
    """Also when it is an adapter, which has its own command."""
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        locate(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="expertmix convert"):
        locate(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no weights"):
        locate(str(tmp_path))


def test_broken_weights_are_told(copy):
    """A truncated file."""
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="copy"):
        load_model(str(copy))


def test_missing_tensors_are_not_made_up(copy):
    """transformers would fill them with random numbers and a warning."""
    file = copy / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.2.self_attn.q_proj.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors .*layers\.2\.self_attn\.q_proj"):
        load_model(str(copy))


def test_an_architecture_that_transformers_does_not_know_is_told(copy):
    """By its name."""
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "futuristic"}))
    with pytest.raises(UnsupportedModelError, match="futuristic"):
        outline(str(copy))


def test_an_unknown_device_is_told(moe):
    """As a wrong setting."""
    with pytest.raises(ConfigError, match="tpu9"):
        load_model(str(moe), device="tpu9")


def test_the_config_names_the_experts(copy):
    """Names that a config holds are those of its sites, with and without the weights."""
    names = json.loads((copy / "config.json").read_text())["expert_names"]
    assert outline(str(copy)).sites[0].experts == tuple(names)
    assert em.sites(load_model(str(copy)))[0].experts == tuple(names)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("hidden_size", "abc", "a wrong value in its config.json: .*'hidden_size' expected int"),
        ("num_experts_per_tok", 10, r"model\.layers\.0\.mlp#0 is to choose 10 of 9 experts"),
    ],
)
def test_a_wrong_config_is_told_before_any_weights_are_read(copy, key, value, says):
    """By its key or its site."""
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(CheckpointError, match=says):
        outline(str(copy))


def test_weights_of_another_shape_are_told(copy):
    """By the name of a tensor."""
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"vocab_size": 7}))
    with pytest.raises(CheckpointError, match=r"another shape.*such as lm_head\.weight"):
        load_model(str(copy))


def test_a_file_is_no_model(copy):
    """It says to name the folder, and does not ask the hub."""
    with pytest.raises(CheckpointError, match=r"is a file: name the folder"):
        locate(str(copy / "model.safetensors"))


def test_a_device_that_computes_nothing_is_refused(moe):
    """`meta` has shapes only."""
    with pytest.raises(ConfigError, match="'meta': it computes nothing"):
        load_model(str(moe), device="meta")
