from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from expertmix.errors import CheckpointError
from expertmix.experts import peft_folder
from expertmix.experts.peft_folder import find_adapters, read_adapter, read_library

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
    """Loading is linear: as many weight files are read as there are adapters."""
    read, real = [], peft_folder.load

    def counting(data: bytes) -> Any:
        read.append(data)
        return real(data)

    monkeypatch.setattr(peft_folder, "load", counting)
    assert len(list(read_library(library))) == len(read) == 5


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
        ({"lora_alpha": True}, "lora_alpha"),
        ({"lora_alpha": float("nan")}, "up_proj.*lora_alpha: nan|down_proj.*lora_alpha: nan"),
        ({"lora_alpha": float("inf")}, "lora_alpha: inf"),
        ({"r": "8"}, "rank '8'.*rank 8"),
        ({"rank_pattern": ["up_proj"]}, "rank_pattern"),
        ({"alpha_pattern": {"(": 4}}, "alpha_pattern"),
        ({"use_dora": True, "target_modules": 5}, "DoRA"),
        ({"use_something_new": True}, "use_something_new=True.*more than a plain LoRA"),
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
    for broken in ("{", "[" * 100_000):
        (folder / "adapter_config.json").write_text(broken)
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


def test_what_was_read_stays_when_the_file_is_written_anew(edited):
    """Overwriting an adapter's file in place, or cutting it, changes no adapter in memory."""
    folder = edited()
    adapter = read_adapter(folder)
    before = {module: one.down.clone() for module, one in adapter.factors.items()}
    with (folder / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(8)
    assert all(torch.equal(adapter.factors[module].down, down) for module, down in before.items())


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("vanishes", [True, False])
def test_files_that_change_while_they_are_read_are_told(edited, monkeypatch, file, vanishes):
    """A config or weights replaced or removed between reading both: a typed error, no mixture."""
    folder, real = edited(), peft_folder.load

    def meanwhile(data: bytes) -> Any:
        path = folder / file
        content = path.read_bytes()
        path.unlink()
        if not vanishes:
            path.write_bytes(content + b" ")
        return real(data)

    monkeypatch.setattr(peft_folder, "load", meanwhile)
    with pytest.raises(CheckpointError, match=r"'ada'.*changed while they were read.*again"):
        read_adapter(folder)


def test_an_adapter_that_is_gone_meanwhile_is_told(library: Path, tmp_path: Path):
    """One that was listed and then removed is a typed error that names its file."""
    for name in ("ada", "bob"):
        (tmp_path / name).symlink_to(library / name)
    reading = read_library(tmp_path)
    assert next(reading).name == "ada"
    (tmp_path / "bob").unlink()
    with pytest.raises(CheckpointError, match="bob"):
        next(reading)


def test_a_list_mixes_libraries_and_adapters(library: Path, tmp_path: Path):
    """Each element may be a folder of adapters or one adapter; order is kept."""
    (tmp_path / "zoe").symlink_to(library / "ada")
    found = [source.name for source in find_adapters([tmp_path, library / "dee"])]
    assert found == ["zoe", "dee"]


def test_settings_that_are_not_used_do_not_matter(edited):
    """A key of another version is let pass while it says nothing."""
    assert read_adapter(edited(use_something_new=False, kept_for_later=None)).factors


def test_a_rank_of_zero_is_refused(edited):
    """Nothing can be divided by it."""
    folder = edited(r=0)
    path = folder / "adapter_model.safetensors"
    empty = {
        key: (value[:0] if "lora_A" in key else value[:, :0]).clone()
        for key, value in load_file(path).items()
    }
    save_file(empty, path)
    with pytest.raises(CheckpointError, match="weights have rank 0"):
        read_adapter(folder)


def test_an_adapted_head_without_its_own_weights(tmp_path: Path):
    """PEFT saves the head itself beside its adapter: the refusal says how not to."""
    with pytest.raises(CheckpointError, match=r"'lm_head'.*save_embedding_layers=False"):
        read_adapter(peft_adapter(tmp_path / "head", 1, target_modules=["lm_head", "q_proj"]))


def test_a_name_that_no_file_can_have(library: Path, tmp_path: Path):
    """One in library.json is a typed error."""
    (tmp_path / "library.json").write_text(json.dumps({"experts": [{"name": "a\0b"}]}))
    with pytest.raises(CheckpointError, match="cannot read"):
        list(read_library(tmp_path))


def test_weights_without_a_config_are_told(library: Path, tmp_path: Path):
    """Beside good adapters, one that lost its config is not passed over."""
    root = Path(shutil.copytree(library, tmp_path / "copy"))
    (root / "bob" / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"'bob'.*adapter_config\.json"):
        find_adapters(root)


def test_a_name_that_is_no_text_is_refused(library: Path, tmp_path: Path):
    """Folder names that are not UTF-8 are named in ASCII, with what to do."""
    root = tmp_path / "odd"
    shutil.copytree(library / "ada", root / os.fsdecode(b"ad\xff"))
    with pytest.raises(CheckpointError, match=r"udcff.*rename"):
        find_adapters(root)
