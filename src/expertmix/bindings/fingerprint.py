"""Which model this is: a hash of its structure and of a sample of its weights.

It tells models apart, cheaply; it does not prove that two models are equal.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

_SAMPLE = 64  # values read of each tensor


def fingerprint(model: nn.Module) -> str:
    """Hex SHA-256 over the name, shape, type and 64 evenly spaced values of all that is saved.

    That is every parameter and every persistent buffer, such as a router's correction bias. The
    device does not matter, the dtype does: rounded weights route differently. Of weights that are
    offloaded from memory only names and shapes count.
    """
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
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
