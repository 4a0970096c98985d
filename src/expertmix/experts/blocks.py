"""The two products of one expert and its rows: by its weight, and for the gradient of its weight.

Which call of torch is fastest depends on how many rows there are. Knows matrices, no experts.

On CPUs the 16-bit products of torch are compiled anew for every number of rows that was not seen
lately: 2 ms, ten times the product itself, and routing gives other numbers at every call. So such
blocks are cut where few numbers recur: a multiple of 64, and the rest.

Legend: b rows, I columns that go in, O that come out.
"""

from __future__ import annotations

import torch
from torch import Tensor

_STEP = 64
_FEW = 16
_COMPILED = (torch.bfloat16, torch.float16)


def multiply(rows_bI: Tensor, map_IO: Tensor, out_bO: Tensor) -> None:
    """Write rows · map."""
    stored_OI = map_IO.t()
    if rows_bI.dtype not in _COMPILED:
        torch.mm(rows_bI, map_IO, out=out_bO)
    elif len(rows_bI) <= _FEW and stored_OI.is_contiguous():  # measured: by a third faster so
        if len(rows_bI) == 1:
            torch.mv(stored_OI, rows_bI[0], out=out_bO[0])
        else:
            out_bO.copy_(torch.mm(stored_OI, rows_bI.t()).t())
    else:
        for part in _parts(rows_bI):
            torch.mm(rows_bI[part], map_IO, out=out_bO[part])


def gather(left_bO: Tensor, right_bI: Tensor, sum_OI: Tensor, *, onto: bool) -> None:
    """Write leftᵀ · right, or add it onto what is there."""
    for part in _parts(left_bO):
        left_Ob = left_bO[part].t()
        if onto:
            torch.addmm(sum_OI, left_Ob, right_bI[part], out=sum_OI)
        else:
            torch.mm(left_Ob, right_bI[part], out=sum_OI)
        onto = True


def _parts(rows: Tensor) -> tuple[slice, ...]:
    count = len(rows)
    cut = count - count % _STEP
    if rows.dtype not in _COMPILED or cut in (0, count):
        return (slice(0, count),)
    return slice(0, cut), slice(cut, count)
