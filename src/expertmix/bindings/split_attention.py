"""Attention of a tail to a context that stays: keys and values in two parts, never joined.

Joining would copy the whole context in every pass, and the gradient in it, which nobody wants,
would cost as much as all the rest. Where the tail never changes either (the first critical layer of
a suffix), what it attended to is kept.

Knows the attention interface of transformers; no model.

Legend: B rows, h heads, g queries per key head, A tail columns, P context columns, d width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from expertmix.errors import UnsupportedRuntimeError

_NAME = "expertmix_split"
_MARK = "expertmix_context"


class NotPlainError(UnsupportedRuntimeError):
    """An attention that cannot be split; `suffix` catches it, and joins."""


@dataclass(eq=False)
class Attended:
    """What a layer's attention gave, where its input stays the same from pass to pass."""

    output: Tensor | None = None


@dataclass(frozen=True, eq=False, slots=True)
class Beside:
    """A context, beside keys and values of a tail.

    Attributes:
        keys: (B, h, P, d).
        values: (B, h, P, d).
        attended: Where the tail stays the same.
    """

    keys: Tensor
    values: Tensor
    attended: Attended | None = None

    def mark(self, keys: Tensor) -> None:
        """These keys of a tail have this context."""
        setattr(keys, _MARK, self)


@contextmanager
def splitting(config: Any, *, on: bool) -> Iterator[None]:
    """Let the layers of this config attend in two parts for the length of the block."""
    before = config._attn_implementation
    if on:
        AttentionInterface.register(_NAME, attend)
        config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """(B, A, heads, d), as transformers asks an attention function.

    Raises:
        NotPlainError: Keys that are not those of a tail, or a rule that is not plain attention:
            sinks, soft caps, biases.
    """
    beside = vars(key).get(_MARK)
    own = {name for name in ("s_aux", "softcap", "position_bias") if options.get(name) is not None}
    if beside is None or own or attention_mask is None or attention_mask.dtype != torch.bool:
        raise NotPlainError(
            f"{type(module).__name__} is not plain attention, or makes keys of what is cached: it "
            f"needs keys and values in one part"
        )
    kept = beside.attended
    if kept is not None and kept.output is not None:
        return kept.output, None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = _attended(query * scale, key, value, beside, attention_mask)
    if kept is not None:
        kept.output = output.detach()
    return output, None


def _attended(query: Tensor, key: Tensor, value: Tensor, beside: Beside, mask: Tensor) -> Tensor:
    B, heads, A, _ = query.shape
    h, P = key.shape[1], beside.keys.shape[2]
    query_BhQd = query.reshape(B, h, heads // h * A, -1)
    scores = torch.cat([query_BhQd @ beside.keys.mT, query_BhQd @ key.mT], dim=-1)
    scores = scores.view(B, heads, A, -1).float().masked_fill(~mask, -torch.inf)
    shares = scores.softmax(-1).to(value.dtype).view(B, h, heads // h * A, -1)
    output = shares[..., :P] @ beside.values + shares[..., P:] @ value
    return output.view(B, heads, A, -1).transpose(1, 2).contiguous()
