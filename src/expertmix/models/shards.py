"""Writing safetensors one tensor at a time.

Knows the safetensors format (8 bytes of header length, a JSON header, then the bytes of each
tensor in order), which lets the header be written before any tensor exists. So a model is
written in the memory of its largest tensor.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from expertmix.errors import UnsupportedModelError

_CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
DTYPES = {code: dtype for dtype, code in _CODES.items()}
"""Types that are read and written, by their names in safetensors."""
Shape = tuple[int, ...]


class Spec(NamedTuple):
    """What a tensor on disk is like.

    Attributes:
        shape: Its shape.
        dtype: Its type; one of `DTYPES`.
    """

    shape: Shape
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Bytes."""
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


def write_tensors(
    folder: Path,
    specs: Mapping[str, Spec],
    produce: Callable[[str], Tensor],
    max_bytes: int = 5_000_000_000,
) -> Iterator[str]:
    """Writes model.safetensors, or shards and their index, asking for each tensor once.

    Args:
        folder: exists.
        specs: names, shapes and types in the order of writing.
        produce: name -> tensor; called just before the tensor is written.
        max_bytes: of one file, unless one tensor alone is larger.

    Yields:
        Each name after its tensor is written.

    Raises:
        UnsupportedModelError: a type that is not written.
    """
    if any(spec.dtype not in _CODES for spec in specs.values()):
        raise UnsupportedModelError(f"weights are written as {', '.join(map(str, _CODES))}")
    shards = _split(specs, max_bytes)
    for number, names in enumerate(shards, 1):
        with (folder / _file_name(number, len(shards))).open("wb") as file:
            _write_header(file, {name: specs[name] for name in names})
            for name in names:
                _write_tensor(file, produce(name), specs[name])
                yield name
    if len(shards) > 1:
        _write_index(folder, shards, sum(spec.size for spec in specs.values()))


def _split(specs: Mapping[str, Spec], max_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    room = max_bytes
    for name, spec in specs.items():
        if spec.size > room and shards[-1]:
            shards.append([])
            room = max_bytes
        shards[-1].append(name)
        room -= spec.size
    return shards


def _file_name(number: int, total: int) -> str:
    return "model.safetensors" if total == 1 else f"model-{number:05d}-of-{total:05d}.safetensors"


def _write_header(file: BinaryIO, specs: Mapping[str, Spec]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, spec in specs.items():
        end = offset + spec.size
        code = _CODES[spec.dtype]
        header[name] = {"dtype": code, "shape": spec.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of eight
    file.write(len(text).to_bytes(8, "little") + text)


def _write_tensor(file: BinaryIO, tensor: Tensor, spec: Spec) -> None:
    assert tuple(tensor.shape) == spec.shape, (tuple(tensor.shape), spec.shape)
    raw = tensor.detach().to(spec.dtype).contiguous().reshape(-1).view(torch.uint8)
    file.write(raw.numpy().data)


def _write_index(folder: Path, shards: list[list[str]], total_size: int) -> None:
    weight_map = {
        name: _file_name(number, len(shards))
        for number, names in enumerate(shards, 1)
        for name in names
    }
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
