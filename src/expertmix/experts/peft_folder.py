"""LoRA adapters read from PEFT's folders: adapter_config.json and adapter_model.safetensors.

Each file is read once, so a hundred adapters cost a hundred times one. Pickled weights are never
read. Knows no model, and imports no peft.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from expertmix.errors import CheckpointError
from expertmix.experts.lora import Adapter, Factors
from expertmix.experts.plain import refuse_unless_plain, scale_of

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
LIBRARY_FILE = "library.json"
_KEY = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight$")
_MODULE = re.compile(
    r"^(base_model\.model\.)?(?P<module>.+?)\.(lora_\w+|base_layer|weight|bias)(\..*)?$"
)


def read_library(path: str | Path | Sequence[str | Path]) -> Iterator[Adapter]:
    """Adapters of a folder of adapters, of one adapter's folder, or of a list of those.

    The order is that of library.json where the folder has one, else by name.

    Yields:
        One adapter at a time, so that not all need to be in memory.

    Raises:
        CheckpointError: No adapter there, or one that is refused (see `read_adapter`).
    """
    for folder in _folders(path):
        yield read_adapter(folder)


def read_adapter(folder: str | Path, name: str | None = None) -> Adapter:
    """One adapter, named after its folder unless a name is given.

    Raises:
        CheckpointError: Files missing or broken, pickled weights, values that are not finite, or an
            adapter that is not exactly `W + scale * B @ A` on named linear modules.
    """
    folder = Path(folder)
    name = name or folder.name
    config = read_json(folder / CONFIG_FILE)
    refuse_unless_plain(config, name)
    sides: dict[str, dict[str, Tensor]] = {}
    for key, value in _read_tensors(folder, name):
        match = _KEY.match(key)
        if match is None or value.dim() != 2:
            raise CheckpointError(_not_linear(name, key, value))
        sides.setdefault(match["module"], {})[match["side"]] = value
    factors = {module: _factors(config, name, module, found) for module, found in sides.items()}
    return Adapter(name, factors, str(config.get("base_model_name_or_path") or ""))


def _factors(config: dict[str, Any], name: str, module: str, found: dict[str, Tensor]) -> Factors:
    if len(found) != 2:
        raise CheckpointError(
            f"adapter {name!r}, module {module!r}: only factor {', '.join(found)} is there"
        )
    scale = scale_of(config, name, module, found["A"].shape[0])
    return Factors(found["A"], found["B"], scale)


def _not_linear(name: str, key: str, value: Tensor) -> str:
    match = _MODULE.match(key)
    module = match["module"] if match else key
    return (
        f"adapter {name!r}, module {module!r}: tensor {key!r} of shape {tuple(value.shape)} is no "
        f"factor of a linear module (an embedding, a convolution, DoRA, or a module saved whole)"
    )


def _folders(path: str | Path | Sequence[str | Path]) -> list[Path]:
    if not isinstance(path, str | Path):
        return [Path(folder) for folder in path]
    root = Path(path)
    if (root / CONFIG_FILE).is_file():
        return [root]
    if not root.is_dir():
        raise CheckpointError(f"no adapters at {root}: not a folder")
    if (root / LIBRARY_FILE).is_file():
        return [root / name for name in _listed(root / LIBRARY_FILE)]
    found = sorted(file.parent for file in root.glob(f"*/{CONFIG_FILE}"))
    if not found:
        raise CheckpointError(f"no adapter in {root}: no folder there holds {CONFIG_FILE}")
    return found


def _listed(path: Path) -> list[str]:
    experts = read_json(path).get("experts")
    if not isinstance(experts, list) or not all(
        isinstance(expert, dict) and isinstance(expert.get("name"), str) for expert in experts
    ):
        raise CheckpointError(f'{path} must list its adapters: {{"experts": [{{"name": …}}, …]}}')
    return [expert["name"] for expert in experts]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: No such file, or no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise CheckpointError(f"cannot read {path}: {problem}") from problem
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return content


def _read_tensors(folder: Path, name: str) -> Iterator[tuple[str, Tensor]]:
    with open_weights(folder, name) as file:
        for key in file.keys():  # noqa: SIM118
            yield key, file.get_tensor(key)


@contextmanager
def open_weights(folder: Path, name: str) -> Iterator[Any]:
    """An adapter's safetensors file, open for reading.

    Raises:
        CheckpointError: It is missing or broken, or the weights are pickled.
    """
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        pickled = sorted(file.name for file in folder.glob("*.bin"))
        found = f"only pickled weights ({pickled[0]}), which can run code" if pickled else "none"
        raise CheckpointError(f"adapter {name!r} needs {WEIGHTS_FILE} in {folder}; found {found}")
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (OSError, SafetensorError) as problem:
        raise CheckpointError(f"adapter {name!r}: {path} is broken: {problem}") from problem
