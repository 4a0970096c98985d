from __future__ import annotations

from pathlib import Path

import pytest
import torch

from expertmix.errors import CheckpointError
from expertmix.models.checkpoint import Checkpoint
from expertmix.models.shards import Spec

from .moe_families import make_moe, tensors


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return make_moe(tmp_path / "moe", "mixtral", max_shard_size="20KB")


def test_a_missing_shard_is_named(sharded: Path) -> None:
    """Before anything is read of the others."""
    gone = sorted(sharded.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(CheckpointError, match=f"lacks 1 of its .* such as {gone.name}"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize("kept", [0, 5, 2000])
def test_a_broken_file_is_named(sharded: Path, kept: int) -> None:
    """Empty, without its whole header, or cut off."""
    broken = sorted(sharded.glob("*.safetensors"))[1]
    broken.write_bytes(broken.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=f"{broken.name} is broken: .* Get it again"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize("text", ["", "[]", '{"weight_map": 1}', '{"weight_map": {"a": 1}}'])
def test_a_broken_index_is_named(sharded: Path, text: str) -> None:
    """It is not guessed what was in it."""
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json is broken"):
        Checkpoint.open(sharded)


def test_pickled_weights_are_refused(sharded: Path) -> None:
    """Reading them can run code."""
    for file in sharded.glob("*.safetensors*"):
        file.unlink()
    (sharded / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="only pickled weights"):
        Checkpoint.open(sharded)


def test_other_files_beside_the_weights_are_not_weights(tmp_path: Path) -> None:
    """Such as the same model in its authors' own names."""
    moe = make_moe(tmp_path / "moe", "mixtral")
    names = set(Checkpoint.open(moe).files)
    (moe / "consolidated.safetensors").write_bytes(b"not even one")
    assert set(Checkpoint.open(moe).files) == names


def test_specs_are_those_of_the_tensors(sharded: Path) -> None:
    """Shape and type of each, from whichever file."""
    expected = {name: Spec(tuple(t.shape), t.dtype) for name, t in tensors(sharded).items()}
    assert Checkpoint.open(sharded).specs() == expected


def test_a_part_is_read_alone(sharded: Path) -> None:
    """Rows of a tensor."""
    checkpoint, name = Checkpoint.open(sharded), "model.embed_tokens.weight"
    assert torch.equal(checkpoint.part(name, slice(3, 5)), tensors(sharded)[name][3:5])
