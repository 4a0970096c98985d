"""Writing safetensors one tensor at a time.

Knows the safetensors format (8 bytes of header length, a JSON header, then the bytes of each
tensor in order), which lets the header be written before any tensor exists. So a model is
written in the memory of its largest tensor.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from expertmix.errors import UnsupportedModelError

_CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
Shape = tuple[int, ...]


def write_tensors(
    folder: Path,
    shapes: Mapping[str, Shape],
    dtype: torch.dtype,
    produce: Callable[[str], Tensor],
    max_bytes: int = 5_000_000_000,
) -> Iterator[str]:
    """Writes model.safetensors, or shards and their index, asking for each tensor once.

    Args:
        folder: exists.
        shapes: names and shapes in the order of writing.
        dtype: float32, bfloat16 or float16, for all tensors.
        produce: name -> tensor; called just before the tensor is written.
        max_bytes: of one file, unless one tensor alone is larger.

    Yields:
        Each name after its tensor is written.

    Raises:
        UnsupportedModelError: a type that is not written.
    """
    if dtype not in _CODES:
        raise UnsupportedModelError(f"weights are written as {', '.join(map(str, _CODES))}")
    shards = _split(shapes, dtype, max_bytes)
    for number, names in enumerate(shards, 1):
        with (folder / _file_name(number, len(shards))).open("wb") as file:
            _write_header(file, {name: shapes[name] for name in names}, dtype)
            for name in names:
                _write_tensor(file, produce(name), shapes[name], dtype)
                yield name
    if len(shards) > 1:
        _write_index(folder, shards, sum(_size(shape, dtype) for shape in shapes.values()))


def _size(shape: Shape, dtype: torch.dtype) -> int:
    return int(torch.Size(shape).numel()) * dtype.itemsize


def _split(shapes: Mapping[str, Shape], dtype: torch.dtype, max_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    room = max_bytes
    for name, shape in shapes.items():
        size = _size(shape, dtype)
        if size > room and shards[-1]:
            shards.append([])
            room = max_bytes
        shards[-1].append(name)
        room -= size
    return shards


def _file_name(number: int, total: int) -> str:
    return "model.safetensors" if total == 1 else f"model-{number:05d}-of-{total:05d}.safetensors"


def _write_header(file: BinaryIO, shapes: Mapping[str, Shape], dtype: torch.dtype) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + _size(shape, dtype)
        header[name] = {"dtype": _CODES[dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of eight
    file.write(len(text).to_bytes(8, "little") + text)


def _write_tensor(file: BinaryIO, tensor: Tensor, shape: Shape, dtype: torch.dtype) -> None:
    assert tuple(tensor.shape) == shape, (tuple(tensor.shape), shape)
    raw = tensor.detach().to(dtype).contiguous().reshape(-1).view(torch.uint8)
    file.write(raw.numpy().data)


def _write_index(folder: Path, shards: list[list[str]], total_size: int) -> None:
    weight_map = {
        name: _file_name(number, len(shards))
        for number, names in enumerate(shards, 1)
        for name in names
    }
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
