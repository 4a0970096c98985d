"""A causal LM's folder on disk: its config, its tensors by name, its tokenizer's files.

Knows safetensors and Hugging Face's file names. Reads one tensor at a time, so a checkpoint
larger than memory can be walked. Pickled weights are refused: reading them can run code.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from expertmix.errors import CheckpointError

_PATTERNS = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_NOT_TOKENIZER = ("config.json", "manifest.json", "expertmix.json")


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

    def copy_tokenizer(self, folder: Path) -> None:
        """Copies everything small that is not the model itself: tokenizer, templates, settings."""
        for file in sorted(self.folder.iterdir()):
            if file.is_file() and _is_small_companion(file):
                shutil.copyfile(file, folder / file.name)

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
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                files |= dict.fromkeys(file.keys(), path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{name}: {path.name} is broken: {error}") from error
    if not files:
        pickled = any(folder.glob("*.bin"))
        reason = "only pickled weights (*.bin), which can run code" if pickled else "no weights"
        raise CheckpointError(f"{name} needs *.safetensors; the folder holds {reason}")
    return files
