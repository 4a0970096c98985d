"""Which weights these are: a hash of names, shapes and a sample of values.

It tells models apart, cheaply; it does not prove that two models are equal.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_SAMPLE = 64  # values read of each tensor


def fingerprint(state: Iterable[tuple[str, Any]], *also: str) -> str:
    """Hex SHA-256 over the name, shape, type and 64 evenly spaced values of every tensor.

    The device does not matter, the dtype does: rounded weights route differently. Of weights that
    are offloaded from memory only names and shapes count.

    Args:
        state: A model's state dict, item by item; what is no tensor is left out.
        also: Anything else that makes a difference.
    """
    digest = hashlib.sha256(" ".join(also).encode())
    for name, tensor in state:
        if isinstance(tensor, Tensor):
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(_sample(tensor))
    return digest.hexdigest()


def _sample(tensor: Tensor) -> bytes:
    if tensor.is_meta or not tensor.numel():
        return b""
    flat = tensor.reshape(-1) if tensor.is_contiguous() else tensor.flatten()
    picked = flat[:: max(1, len(flat) // _SAMPLE)][:_SAMPLE].contiguous().cpu()
    return bytes(picked.view(torch.uint8).tolist())
