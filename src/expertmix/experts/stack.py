"""Adapters of modules that read the same input, stacked for one product.

All directions of all adapters at all these modules lie in one matrix, in the type and on the device
of the input; beside it, where one comes first, a sieve: the same in a coarser type. Per module
there is the way up again. Knows no router and no model.

Legend: E adapters, D width of the input, m width of a module's output, R directions at one module.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from expertmix.experts.shelf import Shelf
from expertmix.experts.sieve import SIEVE, Sieve
from expertmix.experts.spectra import Spectrum
from expertmix.routers.directions import Band, Directions

Projections = torch.dtype | Literal["exact", "sieved"] | None
"""How inputs are projected where a router scores all adapters by all of their directions.

`exact`: in the input's type. A type: in that type, for scores and on the way down. `sieved`: once
coarsely, which names some candidates, and exactly for these, which then decides and goes on.
None: sieved where that pays and changes nothing but near ties beyond the candidates, else exact.
A sieve needs three quarters of the memory of float32 directions again.
"""
SIEVED = 1024
"""With so many directions at a module a sieve saves more than it costs (measured, one CPU core)."""

BLOCK, NEAR = 192, (512, 2048)
"""So many columns of so many rows up stay in a processor's second cache while many tokens add up
the rows of their own adapters: a third to a half of the time (measured, one CPU core)."""


@dataclass(frozen=True)
class Reading:
    """How the stacked directions will be read.

    Attributes:
        whole: The router needs all of them; else those of a few adapters per token.
        projections: In which type, or way.
        again: Who is seen roughly is scored exactly before anything is decided.
    """

    whole: bool = True
    projections: Projections = "exact"
    again: bool = True

    def dtype(self, hidden: torch.dtype) -> torch.dtype:
        """Of the directions, for an input of that type."""
        return self.projections if isinstance(self.projections, torch.dtype) else hidden

    def sieved(self, directions: int, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether a rough product comes first."""
        if not self.whole or dtype.itemsize <= SIEVE.itemsize:
            return False
        if self.projections is None:
            return directions >= SIEVED and device.type == "cpu" and _multiplies_bfloat16()
        return self.projections == "sieved"


def _multiplies_bfloat16() -> bool:
    """Whether the processor does it several times faster than float32."""
    told: Any = getattr(torch.cpu, "get_capabilities", dict)  # an older torch does not say
    return bool(told().get("amx_bf16"))


@dataclass(frozen=True, eq=False)
class Stack:
    """The adapters of one module.

    Attributes:
        columns: Where this module's R values lie in a product with the shared matrix.
        directions: What its adapters read.
        rough: The same in a coarser type, where a sieve comes first.
        up: (b, R, w) singular value times left vector, row by row, m = b * w columns in b blocks.
    """

    columns: slice
    directions: Directions
    rough: Directions | None
    up: Tensor


@dataclass(frozen=True, eq=False)
class SharedStack:
    """The adapters of all modules that read one input.

    Attributes:
        right: (D, sum of R) directions, module after module, each of them in one piece.
        sieve: The same coarsely, or None.
        modules: A stack per module.
        dtype: Of the input, and of the ways up.
    """

    right: Tensor
    sieve: Sieve | None
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
        reading: Reading | None = None,
    ) -> SharedStack:
        """Stack what a shelf has for some modules.

        Args:
            shelf: All adapters.
            modules: Names of modules that read the same input.
            device: Of that input.
            dtype: Of that input.
            reading: How it will be read.
        """
        reading = Reading() if reading is None else reading
        found = {
            module: _present([adapter.modules.get(module) for adapter in shelf])
            for module in modules
        }
        rights = [spectrum.right for present in found.values() for _, spectrum in present]
        right = torch.cat(rights).to(device, reading.dtype(dtype)).T
        most = max(sum(spectrum.rank for _, spectrum in present) for present in found.values())
        sieve = None
        if reading.sieved(most, right.dtype, device):
            sieve = Sieve.of(right, small=reading.again)
        stacks: dict[str, Stack] = {}
        start = 0
        for module, present in found.items():
            stacks[module] = _stack(present, shelf.names, right, sieve, start, dtype)
            start = stacks[module].columns.stop
        return cls(right, sieve, stacks, dtype)


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
    present: _Present,
    names: tuple[str, ...],
    right: Tensor,
    sieve: Sieve | None,
    start: int,
    dtype: torch.dtype,
) -> Stack:
    """A module's part, whose directions start there."""
    singular = torch.cat([spectrum.singular for _, spectrum in present])
    up = torch.cat([spectrum.singular[:, None] * spectrum.left.T for _, spectrum in present])
    columns = slice(start, start + len(singular))
    bands = _bands([(expert, spectrum.rank) for expert, spectrum in present])
    singular = singular.to(right.device, torch.promote_types(dtype, torch.float32))
    rough = None
    if sieve is not None:
        rough = Directions(sieve.right[:, columns], singular, bands, names, coarse=True)
    return Stack(
        columns,
        Directions(right[:, columns], singular, bands, names),
        rough,
        _blocked(up.to(right.device, dtype)),
    )


def _blocked(up_Rm: Tensor) -> Tensor:
    """(b, R, w), contiguous."""
    rows, columns = up_Rm.shape
    fits = NEAR[0] <= rows <= NEAR[1] and columns % BLOCK == 0
    return up_Rm.view(rows, -1, BLOCK if fits else columns).transpose(0, 1).contiguous()


def _bands(ranked: Sequence[tuple[int, int]]) -> tuple[Band, ...]:
    """From (adapter, rank) in rising rank."""
    members: dict[int, list[int]] = {}
    for expert, rank in ranked:
        members.setdefault(rank, []).append(expert)
    bands: list[Band] = []
    for rank, experts in members.items():
        bands.append(Band(tuple(experts), rank, bands[-1].stop if bands else 0))
    return tuple(bands)
