"""A sieve: many directions in a coarse type, good enough to say who cannot be among the highest.

Many tokens are multiplied in bfloat16, where a processor is fast. A few (decoding) are bound by
what is read, and read int8 with a scale per direction: half of the bytes, and in our measurements
as good at naming candidates. Knows no adapter.

Legend: T tokens, D width of the input, R directions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SIEVE = torch.bfloat16
FEW = 8
"""So many tokens or fewer read int8 (measured, one CPU core; at 16 bfloat16 is faster again)."""


@dataclass(frozen=True, eq=False)
class Sieve:
    """Directions, coarsely.

    Attributes:
        right: (D, R) in bfloat16, each direction in one piece.
        small: (R, D) in int8, or None where there is no product with them.
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
        if not small or right.device.type != "cpu":
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
        if self.small is None or self.scales is None or graph or len(hidden) > FEW:
            return rough @ self.right[:, columns]
        small, scales = self.small[columns], self.scales[columns]
        found: Tensor = torch._weight_int8pack_mm(rough.contiguous(), small, scales)
        return found
