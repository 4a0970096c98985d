"""A sieve: many directions in a coarse type, good enough to say who cannot be among the highest.

Many tokens are multiplied in bfloat16, where a processor is fast. A few (decoding) are bound by
what is read, and read int8 with a scale per direction: half of the bytes, and in our measurements
as good at naming candidates. Knows no adapter.

Legend: T tokens, D width of the input, R directions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

SIEVE = torch.bfloat16
FEW = 8
"""So many tokens or fewer read int8 (measured, one CPU core; at 16 bfloat16 is faster again)."""
WHOLE = 32
"""PyTorch's int8 product reads rows in whole pieces (16 numbers on x86) and does not check: a row
whose width is no multiple it reads beyond its end (2.13: NaN, or a segmentation fault)."""


@dataclass(frozen=True, eq=False)
class Sieve:
    """Directions, coarsely.

    Attributes:
        right: (D, R) in bfloat16, each direction in one piece.
        small: (R, D) in int8, or None where there is no (safe) product with them.
        scales: (R,) in bfloat16; direction = scale * small.
    """

    right: Tensor
    small: Tensor | None
    scales: Tensor | None

    @classmethod
    def of(cls, right: Tensor, *, small: bool) -> Sieve:
        """From (D, R) directions.

        Args:
            right: In a finer type.
            small: Also in int8. Not where rough scores themselves decide: they would then differ
                between many tokens at once and one after the other.
        """
        rough = right.to(SIEVE)
        safe = right.device.type == "cpu" and len(right) % WHOLE == 0 and _product() is not None
        if not (small and safe):
            return cls(rough, None, None)
        tiny = torch.finfo(SIEVE).tiny
        scales_R = (right.abs().amax(0) / 127).clamp(min=tiny).to(SIEVE)
        small_RD = (
            (right / scales_R.to(right.dtype))
            .round()
            .clamp(-127, 127)
            .T.to(torch.int8)
            .contiguous()
        )
        return cls(rough, small_RD, scales_R)

    def project(self, hidden: Tensor, columns: slice = slice(None)) -> Tensor:
        """(T, some of R) of (T, D), in bfloat16."""
        rough = hidden.to(SIEVE)
        graph = torch.is_grad_enabled() and hidden.requires_grad
        product = None if graph or len(hidden) > FEW else _product()
        if product is None or self.small is None or self.scales is None:
            return rough @ self.right[:, columns]
        return product(rough.contiguous(), self.small[columns], self.scales[columns])


def _product() -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """PyTorch's int8 product; it is private, so a version may be without it."""
    found: Callable[[Tensor, Tensor, Tensor], Tensor] | None
    found = getattr(torch, "_weight_int8pack_mm", None)
    return found
