"""Which model this is: a hash of its structure and of a sample of its weights.

It tells models apart, cheaply; it does not prove that two models are equal.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

_SAMPLE = 64  # values read of each tensor


def fingerprint(model: nn.Module) -> str:
    """Hex SHA-256 over the name, shape, type and 64 evenly spaced values of every parameter.

    The device does not matter, the dtype does: rounded weights route differently.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        digest.update(_sample(parameter.detach()))
    return digest.hexdigest()


def _sample(tensor: Tensor) -> bytes:
    if tensor.is_meta or not tensor.numel():
        return b""
    flat = tensor.reshape(-1) if tensor.is_contiguous() else tensor.flatten()
    picked = flat[:: max(1, len(flat) // _SAMPLE)][:_SAMPLE].contiguous().cpu()
    return bytes(picked.view(torch.uint8).tolist())
