from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from expertmix.errors import CheckpointError
from expertmix.experts import peft_folder
from expertmix.experts.peft_folder import read_adapter, read_library

from .world import calm, peft_adapter, peft_model, tiny_llama


@pytest.mark.parametrize("name", ["ada", "bob", "cyd", "dee", "eve"])
def test_the_update_is_what_peft_merges(library: Path, name: str):
    """Base plus scale B A is PEFT's merge: rsLoRA, patterns, chosen layers and targets."""
    adapter = read_adapter(library / name)
    plain = tiny_llama().state_dict()
    with calm():
        merged = peft_model(library / name).merge_and_unload().state_dict()
    changed = {key for key in plain if not torch.equal(plain[key], merged[key])}
    assert changed <= {f"{module}.weight" for module in adapter.factors}
    for module, factors in adapter.factors.items():
        expected = merged[f"{module}.weight"] - plain[f"{module}.weight"]
        update = factors.scale * factors.up @ factors.down
        torch.testing.assert_close(update, expected, atol=1e-5, rtol=1e-4)


def test_order_is_by_name_or_as_library_json_says(library: Path, tmp_path: Path):
    """Without library.json adapters come by name; with one, in its order."""
    names = [adapter.name for adapter in read_library(library)]
    assert names == ["ada", "bob", "cyd", "dee", "eve"]
    for name in ("ada", "cyd"):
        (tmp_path / name).symlink_to(library / name)
    listed = {"experts": [{"name": "cyd"}, {"name": "ada"}]}
    (tmp_path / "library.json").write_text(json.dumps(listed))
    assert [adapter.name for adapter in read_library(tmp_path)] == ["cyd", "ada"]
    assert [adapter.name for adapter in read_library(library / "bob")] == ["bob"]


def test_every_file_is_read_once(library: Path, monkeypatch: pytest.MonkeyPatch):
    """Loading is linear: as many weight files are opened as there are adapters."""
    opened, real = [], peft_folder.safe_open

    def counting(path: Path, framework: str) -> Any:
        opened.append(path)
        return real(path, framework)

    monkeypatch.setattr(peft_folder, "safe_open", counting)
    assert len(list(read_library(library))) == len(opened) == 5


@pytest.fixture
def edited(library: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of adapter "ada" whose config has some keys changed."""

    def make(**changes: Any) -> Path:
        folder = tmp_path / "ada"
        folder.mkdir()
        for file in (library / "ada").iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        return folder

    return make


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"use_dora": True}, "DoRA.*up_proj"),
        ({"lora_bias": True}, "have a bias.*up_proj"),
        ({"bias": "all"}, "biases.*up_proj"),
        ({"modules_to_save": ["lm_head"]}, "whole modules.*lm_head"),
        ({"target_parameters": ["experts.down_proj"]}, "parameters"),
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
        ({"r": 7}, "rank 7.*rank 8"),
        ({"lora_alpha": None}, "lora_alpha"),
    ],
)
def test_what_is_not_a_plain_lora_is_refused(edited, change, words):
    """An adapter that is not exactly W + scale B A is refused: name, modules, reason."""
    with pytest.raises(CheckpointError, match=f"'ada'.*{words}"):
        read_adapter(edited(**change))


def test_real_dora_and_embedding_adapters_are_refused(tmp_path: Path):
    """What PEFT itself writes for DoRA, a saved head and an embedding is refused by name."""
    dora = peft_adapter(tmp_path / "dora", 1, use_dora=True)
    head = peft_adapter(tmp_path / "head", 1, modules_to_save=["lm_head"])
    embedding = peft_adapter(tmp_path / "embedding", 1, target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(CheckpointError, match=r"'dora'.*q_proj"):
        read_adapter(dora)
    with pytest.raises(CheckpointError, match=r"'head'.*lm_head"):
        read_adapter(head)
    with pytest.raises(CheckpointError, match=r"'embedding', module '\S*embed_tokens'.*embedding"):
        read_adapter(embedding)


def test_a_magnitude_without_its_config_is_refused(edited):
    """A DoRA tensor in the file is seen even where the config hides it."""
    folder = edited()
    path = folder / "adapter_model.safetensors"
    key = "base_model.model.model.layers.0.mlp.up_proj.lora_magnitude_vector"
    save_file({**load_file(path), key: torch.ones(48)}, path)
    with pytest.raises(CheckpointError, match=r"module 'model.layers.0.mlp.up_proj'.*magnitude"):
        read_adapter(folder)


def test_pickled_missing_and_broken_files_are_refused(edited, tmp_path: Path):
    """Pickles are never read; broken and missing files are typed errors that name the file."""
    folder = edited()
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    with pytest.raises(CheckpointError, match="broken"):
        read_adapter(folder)
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="pickled"):
        read_adapter(folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot read"):
        read_adapter(folder)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(CheckpointError, match="no adapter in"):
        list(read_library(empty))
    with pytest.raises(CheckpointError, match="not a folder"):
        list(read_library(tmp_path / "nowhere"))


def test_half_a_pair_is_refused(edited):
    """A module with A and no B is refused."""
    path = edited() / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"]
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match="only factor A"):
        read_adapter(path.parent)
