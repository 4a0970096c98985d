"""A causal LM's folder on disk: its config, its tensors by name, its tokenizer's files.

Knows safetensors and Hugging Face's file names. Reads one tensor at a time, so a checkpoint
larger than memory can be walked. Pickled weights are refused: reading them can run code.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from expertmix.errors import CheckpointError, UnsupportedModelError
from expertmix.models.shards import DTYPES, Spec

_PATTERNS = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
_INDEX = "model.safetensors.index.json"
DESCRIPTION_FILE = "expertmix.json"
_NOT_TOKENIZER = ("config.json", "manifest.json", DESCRIPTION_FILE)


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    Attributes:
        name: how to speak of it; names no path.
        folder: where its files are.
        files: tensor name -> file that holds it.
    """

    name: str
    folder: Path
    files: dict[str, Path]

    @classmethod
    def open(cls, model: str | Path) -> Checkpoint:
        """Opens a local folder, or a model id of the Hugging Face hub (downloaded once).

        Raises:
            CheckpointError: nothing there, broken, or without safetensors.
        """
        folder = Path(model)
        if not folder.is_dir():
            folder = _download(str(model))
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{model} holds no config.json: not a model folder")
        name = _manifest(folder).get("name") or Path(model).name
        return cls(str(name), folder, _files(folder, str(name)))

    def config(self) -> PreTrainedConfig:
        """The model's config, as transformers reads it; no code of the checkpoint is run.

        Raises:
            CheckpointError: broken, or of a kind that the installed transformers does not know.
        """
        try:
            config: PreTrainedConfig = AutoConfig.from_pretrained(
                self.folder, trust_remote_code=False
            )
        except (StrictDataclassError, OSError, ValueError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"cannot read the config of {self.name}: {reason}") from error
        return config

    def tensor(self, name: str) -> Tensor:
        """One tensor, in the type it is stored in.

        Raises:
            CheckpointError: no tensor of that name.
        """
        with safe_open(self._file(name), "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it.

        Raises:
            CheckpointError: no tensor of that name.
        """
        with safe_open(self._file(name), "pt") as file:
            return tuple(file.get_slice(name).get_shape())

    def part(self, name: str, *places: slice) -> Tensor:
        """A part of a tensor; only that is read.

        Args:
            name: of the tensor.
            places: a slice for each of its first dimensions.

        Raises:
            CheckpointError: no tensor of that name.
        """
        with safe_open(self._file(name), "pt") as file:
            tensor: Tensor = file.get_slice(name)[places]
        return tensor

    def specs(self) -> dict[str, Spec]:
        """Shape and type of every tensor; none is read, each file is opened once.

        Raises:
            UnsupportedModelError: weights of a type that is not written here, such as 8-bit ones.
        """
        return {name: spec for path in set(self.files.values()) for name, spec in self._specs(path)}

    def _specs(self, path: Path) -> Iterator[tuple[str, Spec]]:
        with safe_open(path, "pt") as file:
            for name in (name for name, where in self.files.items() if where == path):
                found = file.get_slice(name)
                if (code := found.get_dtype()) not in DTYPES:
                    raise UnsupportedModelError(
                        f"{self.name}: {name} is stored as {code}: only {', '.join(DTYPES)} can be "
                        f"converted. Use the checkpoint with unquantized weights"
                    )
                yield name, Spec(tuple(found.get_shape()), DTYPES[code])

    def copy_tokenizer(self, folder: Path) -> None:
        """Copies everything small that is not the model itself: tokenizer, templates, settings."""
        for file in sorted(self.folder.iterdir()):
            if file.is_file() and _is_small_companion(file):
                shutil.copyfile(file, folder / file.name)

    def copy_companions(self, folder: Path) -> None:
        """As `copy_tokenizer`, with the description that `upcycle` wrote, where there is one."""
        self.copy_tokenizer(folder)
        if (description := self.folder / DESCRIPTION_FILE).is_file():
            shutil.copyfile(description, folder / DESCRIPTION_FILE)

    def settings(self) -> dict[str, Any]:
        """config.json, word for word."""
        found: dict[str, Any] = json.loads((self.folder / "config.json").read_text())
        return found

    def _file(self, name: str) -> Path:
        if name not in self.files:
            raise CheckpointError(f"{self.name} has no tensor {name!r}")
        return self.files[name]


def _is_small_companion(file: Path) -> bool:
    if file.suffix in _WEIGHTS or file.name.endswith(".index.json"):
        return False
    return file.name not in _NOT_TOKENIZER and any(file.match(p) for p in _PATTERNS)


def _download(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=list(_PATTERNS)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{model!r} is neither a folder nor a model that the hub gives: {error}"
        ) from error


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    content: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return content


def _files(folder: Path, name: str) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for path in _shards(folder, name):
        try:
            with safe_open(path, "pt") as file:
                files |= dict.fromkeys(file.keys(), path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{name}: {path.name} is broken: {error}. Get it again"
            ) from error
    if not files:
        pickled = any(file for pattern in _PICKLED for file in folder.glob(pattern))
        reason = "only pickled weights (*.bin), which can run code" if pickled else "no weights"
        raise CheckpointError(f"{name} needs *.safetensors; the folder holds {reason}")
    return files


def _shards(folder: Path, name: str) -> list[Path]:
    """The files that transformers would read: the whole one, those of the index, or all."""
    whole, index = folder / "model.safetensors", folder / _INDEX
    if whole.is_file() or not index.is_file():
        return [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))
    try:
        listed = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        shards = [folder / Path(file).name for file in listed]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{name}: {_INDEX} is broken. Get it again") from error
    if missing := [path.name for path in shards if not path.is_file()]:
        raise CheckpointError(
            f"{name} lacks {len(missing)} of its {len(shards)} files of weights, such as "
            f"{missing[0]}: get the missing ones"
        )
    return shards
