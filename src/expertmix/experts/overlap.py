"""How much adapters read alike and do alike, pair by pair.

Of the spaces that two adapters read at a module, the mean squared cosine of their principal angles;
of their updates, the cosine. Both come from products of singular vectors, r × r numbers a pair, so
no update is ever formed and the cost is O(E² r² (m + n)) a module, in large products.

Knows no model and no router.

Legend: E adapters, R rows: the directions of all adapters at a module, n and m width of its input
and output, r directions of one adapter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expertmix.errors import CheckpointError
from expertmix.experts.shelf import Shelf
from expertmix.experts.spectra import Spectrum

_BLOCK = 2048  # rows on each side of a product: 16 MB


@dataclass(frozen=True)
class Pair:
    """Two adapters.

    Attributes:
        first: Name of the one that stands first on the shelf.
        second: Name of the other.
        updates: Cosine of their updates.
        reads: Overlap of the spaces that they read.
    """

    first: str
    second: str
    updates: float
    reads: float


@dataclass(frozen=True, eq=False)
class Overlap:
    """Means over the modules at which both of two adapters do something; nan where there is none.

    Attributes:
        names: E adapters.
        reads: (E, E) ‖V_iᵀV_j‖_F² / min(r_i, r_j), in 0..1: 1 where one space holds the other.
        updates: (E, E) ⟨Δ_i, Δ_j⟩_F / (‖Δ_i‖‖Δ_j‖), in -1..1.
        chance: (E, E) what `reads` would be for random spaces: max(r_i, r_j) / n.
        common: (E, E) number of those modules.
    """

    names: tuple[str, ...]
    reads: Tensor
    updates: Tensor
    chance: Tensor
    common: Tensor

    @classmethod
    def of(
        cls,
        shelf: Shelf,
        modules: Sequence[str] | None = None,
        progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
    ) -> Overlap:
        """Compare all pairs.

        Args:
            shelf: E adapters.
            modules: Those that count; all by default. For a thousand adapters some may do.
            progress: Called with (stage, modules done, modules in all).

        Raises:
            CheckpointError: Two adapters are for weights of different shapes: of two bases.
        """
        chosen = tuple(shelf.modules if modules is None else modules)
        sums = _Sums.empty(len(shelf))
        for number, module in enumerate(chosen):
            progress("comparing adapters", number, len(chosen))
            spectra = [adapter.modules.get(module) for adapter in shelf]
            _check(shelf.names, module, spectra)
            sums.add(spectra)
        progress("comparing adapters", len(chosen), len(chosen))
        return cls(
            shelf.names,
            (sums.reads / sums.common).clamp(0, 1),
            (sums.updates / sums.common).clamp(-1, 1),
            sums.chance / sums.common,
            sums.common.long(),
        )

    def nearest(self, number: int) -> int | None:
        """The other adapter whose updates are most like those of this one; None for a lone one."""
        cosines_E = self.updates[number].nan_to_num(nan=-math.inf).clone()
        cosines_E[number] = -math.inf
        best = int(cosines_E.argmax())
        return best if cosines_E[best] > -math.inf else None

    def pair(self, first: int, second: int) -> Pair:
        """Two adapters by number."""
        updates, reads = float(self.updates[first, second]), float(self.reads[first, second])
        return Pair(self.names[first], self.names[second], updates, reads)

    def duplicates(self, threshold: float = 0.99) -> tuple[Pair, ...]:
        """Pairs whose updates have a larger cosine; the most alike first."""
        above_EE = (self.updates > threshold).triu(1)
        found = [self.pair(first, second) for first, second in above_EE.nonzero().tolist()]
        return tuple(sorted(found, key=lambda pair: -pair.updates))


def _check(names: Sequence[str], module: str, spectra: Sequence[Spectrum | None]) -> None:
    shapes = {one.shape: name for name, one in zip(names, spectra, strict=True) if one is not None}
    if len(shapes) > 1:
        (shape, name), (other, another) = list(shapes.items())[:2]
        raise CheckpointError(
            f"adapters {name!r} and {another!r} are of two bases: at module {module!r} one is for "
            f"a weight of shape {shape}, the other for {other}. Compare the adapters of one base."
        )


@dataclass(frozen=True, eq=False)
class _Sums:
    """(E, E) float64 each, filled module by module."""

    reads: Tensor
    updates: Tensor
    chance: Tensor
    common: Tensor

    @classmethod
    def empty(cls, experts: int) -> _Sums:
        return cls(*torch.zeros(4, experts, experts, dtype=torch.float64))

    def add(self, spectra: Sequence[Spectrum | None]) -> None:
        """One module, at which each adapter has a spectrum or none."""
        present = [(n, one) for n, one in enumerate(spectra) if one is not None and one.rank]
        blocks = [_Block.of(part) for part in _parts(present)]
        for number, rows in enumerate(blocks):
            for columns in blocks[number:]:
                self._add(rows, columns)

    def _add(self, rows: _Block, columns: _Block) -> None:
        reading_RR, writing_RR = rows.right @ columns.right.T, rows.left @ columns.left.T
        ranks = rows.ranks[:, None], columns.ranks[None]
        small, large = torch.minimum(*ranks), torch.maximum(*ranks)
        for table, values in (
            (self.reads, _by_pair(reading_RR.square(), rows, columns) / small),
            (self.updates, _by_pair(reading_RR * writing_RR, rows, columns)),
            (self.chance, large / rows.right.shape[1]),
            (self.common, torch.ones_like(large)),
        ):
            table[rows.experts[:, None], columns.experts] += values
            if rows is not columns:
                table[columns.experts[:, None], rows.experts] += values.T


@dataclass(frozen=True, eq=False)
class _Block:
    """Some adapters at a module.

    Attributes:
        experts: (e,) their numbers.
        ranks: (e,) how many directions each has, float64.
        owners: (R,) which of the e each row belongs to.
        right: (R, n) directions.
        left: (R, m) singular value times left vector, so that each adapter has norm one.
    """

    experts: Tensor
    ranks: Tensor
    owners: Tensor
    right: Tensor
    left: Tensor

    @classmethod
    def of(cls, present: Sequence[tuple[int, Spectrum]]) -> _Block:
        ranks = torch.tensor([spectrum.rank for _, spectrum in present])
        lefts = [
            (one.singular / one.singular.norm())[:, None].float() * one.left.T.float()
            for _, one in present
        ]
        return cls(
            torch.tensor([number for number, _ in present]),
            ranks.double(),
            torch.repeat_interleave(torch.arange(len(present)), ranks),
            torch.cat([spectrum.right.float() for _, spectrum in present]).cpu(),
            torch.cat(lefts).cpu(),
        )


def _parts(present: list[tuple[int, Spectrum]]) -> Iterator[list[tuple[int, Spectrum]]]:
    """As many adapters at a time as have not more rows than fit."""
    step = max(1, _BLOCK // max((spectrum.rank for _, spectrum in present), default=1))
    for start in range(0, len(present), step):
        yield present[start : start + step]


def _by_pair(values_RR: Tensor, rows: _Block, columns: _Block) -> Tensor:
    """Sums over the rows and columns of each pair of adapters."""
    half = values_RR.new_zeros(len(rows.experts), values_RR.shape[1])
    half.index_add_(0, rows.owners, values_RR)
    whole = half.new_zeros(len(rows.experts), len(columns.experts))
    return whole.index_add_(1, columns.owners, half).double()
