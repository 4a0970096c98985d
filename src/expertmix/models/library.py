"""A library of LoRA adapters, read straight from PEFT's folders.

Knows PEFT's file format (adapter_config.json, adapter_model.safetensors) and what each number
in it does to a weight. Knows no model and imports no peft, so opening a hundred adapters costs
a hundred small file headers. What cannot be said exactly as `W + scale * B @ A` is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from expertmix.errors import CheckpointError
from expertmix.experts.peft_folder import CONFIG_FILE, LIBRARY_FILE, open_weights, read_json
from expertmix.experts.plain import refuse_unless_plain, scale_of

_FACTOR = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight$")


@dataclass(frozen=True)
class Update:
    """What a LoRA adapter does to one module: `W + scale * B @ A`.

    Attributes:
        scale: alpha / rank, or alpha / sqrt(rank) for rsLoRA.
        rank: columns of B.
        shape: (out_features, in_features) of the weight it fits.
    """

    scale: float
    rank: int
    shape: tuple[int, int]


@dataclass(frozen=True)
class Adapter:
    """One LoRA adapter on disk.

    Attributes:
        name: unique within its library.
        folder: where its two files are.
        base: the base model as its config names it; may be empty.
        updates: per adapted module (`model.layers.0.mlp.up_proj`) what it does there.
    """

    name: str
    folder: Path
    base: str
    updates: dict[str, Update]

    @classmethod
    def open(cls, folder: str | Path, name: str | None = None) -> Adapter:
        """Reads and checks an adapter; its weights stay on disk.

        Args:
            folder: holds adapter_config.json and adapter_model.safetensors.
            name: defaults to the folder's name.

        Raises:
            CheckpointError: files missing or broken, pickled weights, or an adapter that is not
                exactly `W + scale * B @ A` on named modules.
        """
        folder = Path(folder)
        name = name or folder.name
        config = _read_config(folder, name)
        updates = {
            module: Update(scale_of(config, name, module, a[0]), a[0], (b[0], a[1]))
            for module, a, b in _factors(folder, name)
        }
        return cls(name, folder, str(config.get("base_model_name_or_path") or ""), updates)

    def factors(self, module: str) -> tuple[Tensor, Tensor]:
        """The two factors of a module in float32, the scale not applied.

        Args:
            module: a key of `updates`.

        Returns:
            A [rank, in_features] and B [out_features, rank].

        Raises:
            CheckpointError: the adapter does not adapt this module, or its values are not finite.
        """
        if module not in self.updates:
            raise CheckpointError(f"adapter {self.name!r} does not adapt module {module!r}")
        with open_weights(self.folder, self.name) as file:
            key = f"base_model.model.{module}.lora_"
            a, b = (file.get_tensor(f"{key}{side}.weight").float() for side in "AB")
        if not bool(a.isfinite().all() & b.isfinite().all()):
            raise CheckpointError(
                f"adapter {self.name!r}, module {module!r}: weights are NaN or infinite; train it "
                f"again or leave it out"
            )
        return a, b

    def delta(self, module: str) -> Tensor:
        """What the adapter adds to the module's weight: `scale * B @ A`.

        Args:
            module: a key of `updates`.

        Returns:
            float32 [out_features, in_features].

        Raises:
            CheckpointError: the adapter does not adapt this module.
        """
        a, b = self.factors(module)
        return self.updates[module].scale * (b @ a)


@dataclass(frozen=True)
class Library:
    """Adapters of one base model, in a fixed order.

    Attributes:
        adapters: with unique names.
        about: the content of library.json, where there is one.
    """

    adapters: tuple[Adapter, ...]
    about: dict[str, Any]

    @classmethod
    def open(cls, path: str | Path | Sequence[str | Path]) -> Library:
        """Opens a folder of adapters, one adapter's folder, or a list of adapter folders.

        The order is that of library.json where the folder has one, else by name.

        Raises:
            CheckpointError: no adapter there, two of the same name, or one that is refused
                (see `Adapter.open`).
        """
        if not isinstance(path, str | Path):
            return cls(_unique([Adapter.open(folder) for folder in path]), {})
        root = Path(path)
        if (root / CONFIG_FILE).is_file():
            return cls((Adapter.open(root),), {})
        about = read_json(root / LIBRARY_FILE) if (root / LIBRARY_FILE).is_file() else {}
        return cls(_unique([Adapter.open(folder) for folder in _folders(root, about)]), about)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the adapters, in order."""
        return tuple(adapter.name for adapter in self.adapters)

    def __iter__(self) -> Iterator[Adapter]:
        return iter(self.adapters)

    def __len__(self) -> int:
        return len(self.adapters)

    def named(self, name: str) -> Adapter:
        """The adapter of that name.

        Raises:
            CheckpointError: there is none.
        """
        if name not in self.names:
            raise CheckpointError(f"no adapter {name!r}; the library has {', '.join(self.names)}")
        return self.adapters[self.names.index(name)]


def default_library() -> Library:
    """The eight LoRA experts that expertmix ships for its embedded default LM."""
    return Library.open(Path(__file__).parent.parent / "assets" / "experts")


def _folders(root: Path, about: dict[str, Any]) -> list[Path]:
    if not root.is_dir():
        raise CheckpointError(f"no adapter library at {root}: not a folder")
    if "experts" in about:
        return [root / str(expert["name"]) for expert in about["experts"]]
    folders = sorted(file.parent for file in root.glob(f"*/{CONFIG_FILE}"))
    if not folders:
        raise CheckpointError(f"no adapter in {root}: no folder there holds {CONFIG_FILE}")
    return folders


def _unique(adapters: list[Adapter]) -> tuple[Adapter, ...]:
    names = [adapter.name for adapter in adapters]
    if twice := {name for name in names if names.count(name) > 1}:
        raise CheckpointError(f"two adapters are named {sorted(twice)[0]!r}: rename one folder")
    if not adapters:
        raise CheckpointError("an adapter library needs at least one adapter; the list is empty")
    return tuple(adapters)


def _read_config(folder: Path, name: str) -> dict[str, Any]:
    config = read_json(folder / CONFIG_FILE)
    refuse_unless_plain(config, name)
    return config


def _factors(folder: Path, name: str) -> Iterator[tuple[str, list[int], list[int]]]:
    """Per adapted module the shapes of A and B, after checking that they come in fitting pairs."""
    sides: dict[str, dict[str, list[int]]] = {}
    for key, shape in _shapes(folder, name).items():
        match = _FACTOR.match(key)
        if match is None or len(shape) != 2:
            raise CheckpointError(f"adapter {name!r}: tensor {key!r} is not a LoRA factor")
        sides.setdefault(match["module"], {})[match["side"]] = shape
    for module, found in sides.items():
        if len(found) != 2 or found["A"][0] != found["B"][1]:
            raise CheckpointError(f"adapter {name!r}: factors of {module!r} do not fit: {found}")
        yield module, found["A"], found["B"]


def _shapes(folder: Path, name: str) -> dict[str, list[int]]:
    with open_weights(folder, name) as file:
        return {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
