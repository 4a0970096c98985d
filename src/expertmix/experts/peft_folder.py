"""LoRA adapters read from PEFT's folders: adapter_config.json and adapter_model.safetensors.

Each file is read once and as a whole, so a hundred adapters cost a hundred times one, and what was
read stays as it is when a file is written anew (a mapped file would change, or end the process).
Pickled weights are never read. Knows no model, and imports no peft.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor

from expertmix.errors import CheckpointError
from expertmix.experts import hub
from expertmix.experts.lora import Adapter, Factors
from expertmix.experts.plain import refuse_unless_plain, scale_of

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
LIBRARY_FILE = "library.json"
_KEY = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight$")
_MODULE = re.compile(
    r"^(base_model\.model\.)?(?P<module>.+?)\.(lora_\w+|base_layer|weight|bias)(\..*)?$"
)


Places = str | Path | Sequence[str | Path]
"""A folder of adapters, one adapter's folder, a hub id `owner/name`, or a list of those."""


@dataclass(frozen=True)
class Source:
    """Where one adapter lies.

    Attributes:
        folder: With its two files.
        name: Of the adapter.
        home: Of its library: where things can be kept beside it.
        hub_id: Of the repository that holds it alone, or empty.
    """

    folder: Path
    name: str
    home: Path
    hub_id: str = ""

    def read(self) -> Adapter:
        """See `read_adapter`."""
        return read_adapter(self.folder, self.name)


def find_adapters(places: Places) -> list[Source]:
    """Adapters of a folder, a hub id, or a list of those; no weights are read.

    The order is that of library.json where a folder has one, else by name. An adapter is named
    after its folder, one from the hub after its repository (with the owner where two are the same).

    Raises:
        CheckpointError: No adapter there, or it cannot be fetched.
    """
    if isinstance(places, str | Path):
        found = _found(places)
    else:
        found = _told_apart([source for place in places for source in _found(place)])
    for source in found:
        _check_name(source.name)
    return found


def read_library(places: Places) -> Iterator[Adapter]:
    """Adapters of a folder of adapters, of one adapter's folder, a hub id, or a list of those.

    Yields:
        One adapter at a time, so that not all need to be in memory; in the order of
        `find_adapters`.

    Raises:
        CheckpointError: No adapter there, or one that is refused (see `read_adapter`).
    """
    for source in find_adapters(places):
        yield source.read()


def read_adapter(folder: str | Path, name: str | None = None) -> Adapter:
    """One adapter, named after its folder unless a name is given.

    Raises:
        CheckpointError: Files missing or broken, pickled weights, values that are not finite, files
            that change meanwhile, or an adapter that is not exactly `W + scale * B @ A` on named
            linear modules.
    """
    folder = Path(folder)
    name = name or folder.name
    before = _state(folder)
    config = read_json(folder / CONFIG_FILE)
    refuse_unless_plain(config, name)
    sides: dict[str, dict[str, Tensor]] = {}
    for key, value in _read_tensors(folder, name).items():
        match = _KEY.match(key)
        if match is None or value.dim() != 2:
            raise CheckpointError(_not_linear(name, key, value))
        sides.setdefault(match["module"], {})[match["side"]] = value
    if _state(folder) != before:
        raise CheckpointError(
            f"adapter {name!r}: files in {folder} changed while they were read; load it again when "
            f"whatever writes there has ended"
        )
    factors = {module: _factors(config, name, module, found) for module, found in sides.items()}
    return Adapter(name, factors, str(config.get("base_model_name_or_path") or ""))


def _state(folder: Path) -> list[tuple[int, int, int] | None]:
    """Which files lie there: another one, or other content, has another state."""
    return [_file_state(folder / file) for file in (CONFIG_FILE, WEIGHTS_FILE)]


def _file_state(path: Path) -> tuple[int, int, int] | None:
    try:
        stat = path.stat()
    except (OSError, ValueError):  # a name that no file can have
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


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
        f"factor of a linear module (an embedding, a convolution, DoRA, or a module saved whole; "
        f"an adapted head without its own weights: save_pretrained(save_embedding_layers=False))"
    )


def _found(place: str | Path) -> list[Source]:
    if hub.is_hub_id(place):
        return _fetched(str(place))
    root = Path(place)
    if (root / CONFIG_FILE).is_file():
        own = root.absolute()
        return [Source(root, own.name, own.parent)]
    if not root.is_dir():
        raise CheckpointError(f"no adapters at {root}: not a folder, and no hub id owner/name")
    return [Source(folder, folder.name, root) for folder in _folders(root)]


def _fetched(name: str) -> list[Source]:
    root = hub.fetch(name, (CONFIG_FILE, WEIGHTS_FILE, LIBRARY_FILE))
    if (root / CONFIG_FILE).is_file():
        return [Source(root, name.partition("/")[2], hub.home(root), name)]
    return [Source(folder, folder.name, hub.home(root)) for folder in _folders(root)]


def _told_apart(sources: Sequence[Source]) -> list[Source]:
    counts = Counter(source.name for source in sources)
    return [
        replace(source, name=source.hub_id) if source.hub_id and counts[source.name] > 1 else source
        for source in sources
    ]


def _check_name(name: str) -> None:
    """A name must be text: it stands in traces, tables and pages."""
    try:
        name.encode()
    except UnicodeEncodeError as problem:
        raise CheckpointError(
            f"the adapter folder {name!a} has a name that is not UTF-8 here: rename it, or "
            f"use a UTF-8 locale (LC_ALL=C.UTF-8)"
        ) from problem


def _folders(root: Path) -> list[Path]:
    if (root / LIBRARY_FILE).is_file():
        return [root / name for name in _listed(root / LIBRARY_FILE)]
    found = sorted(file.parent for file in root.glob(f"*/{CONFIG_FILE}"))
    bare = {file.parent for file in root.glob(f"*/{WEIGHTS_FILE}")} - set(found)
    if bare:
        raise CheckpointError(
            f"adapter {min(bare).name!r} has weights and no {CONFIG_FILE} in {root}: its rank and "
            f"scale are unknown. Get that file again, or move the folder away."
        )
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
    except (OSError, ValueError, RecursionError) as problem:
        raise CheckpointError(f"cannot read {path}: {problem}") from problem
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return content


def _read_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    path = _weights(folder, name)
    try:
        return dict(sorted(load(path.read_bytes()).items()))
    except (OSError, SafetensorError, ValueError, KeyError) as problem:
        raise _broken(path, name, problem) from problem


@contextmanager
def open_weights(folder: Path, name: str) -> Iterator[Any]:
    """An adapter's safetensors file, open for reading.

    Raises:
        CheckpointError: It is missing or broken, or the weights are pickled.
    """
    path = _weights(folder, name)
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (OSError, SafetensorError) as problem:
        raise _broken(path, name, problem) from problem


def _weights(folder: Path, name: str) -> Path:
    path = folder / WEIGHTS_FILE
    if path.is_file():
        return path
    pickled = sorted(file.name for file in folder.glob("*.bin"))
    found = f"only pickled weights ({pickled[0]}), which can run code" if pickled else "none"
    raise CheckpointError(f"adapter {name!r} needs {WEIGHTS_FILE} in {folder}; found {found}")


def _broken(path: Path, name: str, problem: Exception) -> CheckpointError:
    return CheckpointError(f"adapter {name!r}: {path} is broken: {problem}")
