"""Adapters of modules that read the same input, stacked for one product.

All directions of all adapters at all these modules lie in one matrix, in the type and on the device
of the input; per module there is the way up again. Knows no router and no model.

Legend: E adapters, D width of the input, m width of a module's output, R directions at one module,
r the highest rank there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expertmix.experts.shelf import Shelf
from expertmix.experts.spectra import Spectrum
from expertmix.routers.directions import Band, Directions


@dataclass(frozen=True, eq=False)
class Stack:
    """The adapters of one module.

    Attributes:
        columns: Where this module's R values lie in a product with the shared matrix.
        directions: What its adapters read.
        up: (R, m) singular value times left vector, row by row.
        rows: (E, r) rows of each adapter, and row 0 where it has fewer than r.
        filled: (E, r) which of them are the adapter's, or None where all are.
    """

    columns: slice
    directions: Directions
    up: Tensor
    rows: Tensor
    filled: Tensor | None


@dataclass(frozen=True, eq=False)
class SharedStack:
    """The adapters of all modules that read one input.

    Attributes:
        right: (D, sum of R) directions, module after module; in this order a few tokens (decoding)
            read it a fifth faster than transposed.
        modules: A stack per module.
        dtype: Of the input, and of the ways up; `right` may be coarser.
    """

    right: Tensor
    modules: dict[str, Stack]
    dtype: torch.dtype

    @classmethod
    def build(
        cls,
        shelf: Shelf,
        modules: Sequence[str],
        *,
        device: torch.device,
        dtype: torch.dtype,
        projections: torch.dtype | None = None,
    ) -> SharedStack:
        """Stack what a shelf has for some modules.

        Args:
            shelf: All adapters.
            modules: Names of modules that read the same input.
            device: Of that input.
            dtype: Of that input.
            projections: In which it is projected, where that is another.
        """
        found = {
            module: _present([adapter.modules.get(module) for adapter in shelf])
            for module in modules
        }
        rights = [spectrum.right for present in found.values() for _, spectrum in present]
        right = torch.cat(rights).T.to(device, projections or dtype).contiguous()
        stacks: dict[str, Stack] = {}
        start = 0
        for module, present in found.items():
            stacks[module] = _stack(present, shelf.names, right, start, dtype)
            start = stacks[module].columns.stop
        return cls(right, stacks, dtype)


_Present = list[tuple[int, Spectrum]]
"""Adapters that do something at a module, by number."""


def _present(spectra: Sequence[Spectrum | None]) -> _Present:
    """Those of equal rank together, in rising rank, else in order."""
    found = [
        (expert, spectrum)
        for expert, spectrum in enumerate(spectra)
        if spectrum is not None and spectrum.rank
    ]
    return sorted(found, key=lambda one: one[1].rank)


def _stack(
    present: _Present, names: tuple[str, ...], right: Tensor, start: int, dtype: torch.dtype
) -> Stack:
    singular = torch.cat([spectrum.singular for _, spectrum in present])
    up = torch.cat([spectrum.singular[:, None] * spectrum.left.T for _, spectrum in present])
    columns = slice(start, start + len(singular))
    bands = _bands([(expert, spectrum.rank) for expert, spectrum in present])
    rows, filled = _rows(bands, len(names))
    fine = torch.promote_types(dtype, torch.float32)
    return Stack(
        columns,
        Directions(right[:, columns], singular.to(right.device, fine), bands, names),
        up.to(right.device, dtype),
        rows.to(right.device),
        None if bool(filled.all()) else filled.to(right.device),
    )


def _bands(ranked: Sequence[tuple[int, int]]) -> tuple[Band, ...]:
    """From (adapter, rank) in rising rank."""
    members: dict[int, list[int]] = {}
    for expert, rank in ranked:
        members.setdefault(rank, []).append(expert)
    bands: list[Band] = []
    for rank, experts in members.items():
        bands.append(Band(tuple(experts), rank, bands[-1].stop if bands else 0))
    return tuple(bands)


def _rows(bands: Sequence[Band], experts: int) -> tuple[Tensor, Tensor]:
    highest = max(band.rank for band in bands)
    rows_Er = torch.zeros(experts, highest, dtype=torch.int64)
    filled_Er = torch.zeros(experts, highest, dtype=torch.bool)
    for band in bands:
        own = torch.arange(band.start, band.stop).view(len(band.experts), band.rank)
        rows_Er[list(band.experts), : band.rank] = own
        filled_Er[list(band.experts), : band.rank] = True
    return rows_Er, filled_Er
