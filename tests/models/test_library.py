from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from expertmix.errors import CheckpointError
from expertmix.models.library import Adapter, Library, default_library

from .conftest import load, peft_adapter, peft_model


@pytest.mark.parametrize("name", ["ada", "bob", "cyd"])
def test_delta_is_what_peft_merges(base: Path, shelf: Path, name: str) -> None:
    """Base weight plus delta is the weight that PEFT's own merge gives, patterns included."""
    adapter = Library.open(shelf).named(name)
    plain = load(base).state_dict()
    merged = peft_model(base, shelf / name).merge_and_unload().state_dict()
    assert len(adapter.updates) == 6
    for module in adapter.updates:
        expected = merged[f"{module}.weight"] - plain[f"{module}.weight"]
        torch.testing.assert_close(adapter.delta(module), expected, atol=1e-5, rtol=1e-4)


def test_order_is_by_name_or_as_library_json_says(shelf: Path, tmp_path: Path) -> None:
    """Without library.json adapters come by name; with one, in its order."""
    assert Library.open(shelf).names == ("ada", "bob", "cyd")
    for name in ("ada", "cyd"):
        (tmp_path / name).symlink_to(shelf / name)
    listed = {"experts": [{"name": "cyd"}, {"name": "ada"}]}
    (tmp_path / "library.json").write_text(json.dumps(listed))
    assert Library.open(tmp_path).names == ("cyd", "ada")


def test_a_single_adapter_and_a_list_of_folders_are_libraries(shelf: Path) -> None:
    """One adapter's folder opens as a library of one, a list of folders in the list's order."""
    assert Library.open(shelf / "bob").names == ("bob",)
    assert Library.open([shelf / "cyd", shelf / "ada"]).names == ("cyd", "ada")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True}, "bias"),
        ({"bias": "all"}, "biases"),
        ({"modules_to_save": ["lm_head"]}, "whole modules"),
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
        ({"target_parameters": ["experts.down_proj"]}, "parameters"),
        ({"r": 7}, "rank 7"),
    ],
)
def test_what_is_not_a_plain_lora_is_refused(
    edited: Callable[..., Path], change: dict[str, Any], words: str
) -> None:
    """An adapter that is not exactly W + scale * B @ A is refused by name, with the reason."""
    with pytest.raises(CheckpointError, match=f"ada.*{words}"):
        Adapter.open(edited(**change))


def test_pickled_weights_are_refused(edited: Callable[..., Path]) -> None:
    """Pickled weights are never read."""
    folder = edited()
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="pickled"):
        Adapter.open(folder)


def test_broken_files_are_refused(edited: Callable[..., Path]) -> None:
    """A truncated weights file and a config that is not JSON are typed errors."""
    folder = edited()
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="broken"):
        Adapter.open(folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="adapter_config"):
        Adapter.open(folder)


def test_tensors_that_are_no_factors_are_refused(edited: Callable[..., Path]) -> None:
    """A DoRA magnitude, or a factor without its partner, is named."""
    folder = edited()
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    first = next(key for key in tensors if "lora_A" in key)
    save_file({**tensors, "base_model.model.lm_head.weight": torch.ones(2, 2)}, weights)
    with pytest.raises(CheckpointError, match="lm_head"):
        Adapter.open(folder)
    save_file({key: value for key, value in tensors.items() if key != first}, weights)
    with pytest.raises(CheckpointError, match="do not fit"):
        Adapter.open(folder)


def test_values_that_are_not_finite_are_refused(edited: Callable[..., Path]) -> None:
    """A NaN in a factor is an error that names adapter and module, not a broken MoE."""
    folder = edited()
    tensors = load_file(folder / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, folder / "adapter_model.safetensors")
    adapter = Adapter.open(folder)
    with pytest.raises(CheckpointError, match="NaN"):
        [adapter.delta(module) for module in adapter.updates]


def test_empty_and_ambiguous_libraries_are_refused(shelf: Path, tmp_path: Path) -> None:
    """A folder without adapters, a missing folder and two equal names are typed errors."""
    for target in (tmp_path, tmp_path / "absent", [], [shelf / "ada", shelf / "ada"]):
        with pytest.raises(CheckpointError):
            Library.open(target)


def test_unknown_names_are_refused(shelf: Path) -> None:
    """Asking for an adapter or a module that is not there says what there is."""
    library = Library.open(shelf)
    with pytest.raises(CheckpointError, match="ada, bob, cyd"):
        library.named("eve")
    with pytest.raises(CheckpointError, match="lm_head"):
        library.named("ada").delta("lm_head")


def test_the_shipped_library_is_whole() -> None:
    """Eight plain LoRA experts on MLP projections only, under 30 MB, naming no path."""
    library = default_library()
    assert len(library) == 8
    assert {adapter.base for adapter in library} == {"SmolLM2-135M-Instruct"}
    ranks = {update.rank for adapter in library for update in adapter.updates.values()}
    assert ranks == {4, 8, 16}
    assert all(".mlp." in module for adapter in library for module in adapter.updates)
    size = sum(file.stat().st_size for a in library for file in a.folder.iterdir())
    assert size < 30e6


def test_every_shipped_expert_wins_its_own_domain() -> None:
    """In the held-out matrix that ships, a domain's lowest loss is that of its own expert."""
    library = default_library()
    matrix = library.about["heldout_loss"]
    for domain in library.names:
        losses = {name: matrix[name][domain] for name in (*library.names, "base")}
        assert min(losses, key=lambda name: losses[name]) == domain


def test_adapter_without_some_projections_is_fine(base: Path, tmp_path: Path) -> None:
    """An adapter may touch only some projections of some layers."""
    folder = peft_adapter(base, tmp_path / "few", 5, target_modules=r".*layers\.1\.mlp\.up_proj")
    assert list(Adapter.open(folder).updates) == ["model.layers.1.mlp.up_proj"]
