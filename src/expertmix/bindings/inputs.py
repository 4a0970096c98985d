"""Which tokens a transformers model was given, read from the arguments of its forward.

Legend: B rows of the batch, S columns of this pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from expertmix.errors import UnsupportedRuntimeError


def read_inputs(given: dict[str, Any]) -> tuple[Tensor, Tensor, int]:
    """(B, S) token ids, (B, S) which of them are real, and how many columns the cache holds.

    Raises:
        UnsupportedRuntimeError: The tokens cannot be named.
    """
    ids_BS: Any = given.get("input_ids")
    embeds: Any = given.get("inputs_embeds")
    if ids_BS is None and embeds is None:
        raise UnsupportedRuntimeError(
            "the model was given neither input_ids nor inputs_embeds: its tokens have no names"
        )
    if ids_BS is None:
        ids_BS = torch.full(embeds.shape[:2], -1, dtype=torch.int64, device=embeds.device)
    past = _cached(given)
    return ids_BS, _real(given.get("attention_mask"), ids_BS, past), past


def _cached(given: dict[str, Any]) -> int:
    caches = (given.get(name) for name in ("cache", "past_key_values"))
    cache = next((cache for cache in caches if cache is not None), None)
    if type(cache).__name__ == "PagedAttentionCache":
        raise UnsupportedRuntimeError(
            "continuous batching packs many requests into one row: decisions cannot be named by "
            "token. Use generate()."
        )
    return 0 if cache is None else int(cache.get_seq_length())


def _real(mask: Any, ids_BS: Tensor, past: int) -> Tensor:
    """(B, S) bool from a 2-D mask over keys, or from a 4-D one: who may attend to itself."""
    columns = ids_BS.shape[1]
    if isinstance(mask, dict):
        mask = mask.get("full_attention")
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= columns:
        start = min(past, mask.shape[1] - columns)
        return mask[:, start : start + columns].bool().to(ids_BS.device)
    if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[-1] >= past + columns:
        self_BS = mask[:, 0, -columns:, past : past + columns].diagonal(dim1=1, dim2=2)
        real_BS = self_BS if self_BS.dtype == torch.bool else self_BS == 0
        return real_BS.to(ids_BS.device).expand(ids_BS.shape)
    return torch.ones_like(ids_BS, dtype=torch.bool)
