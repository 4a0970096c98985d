"""How large an adapter's updates are, and how many directions they really use.

From singular values alone. Knows no model and no router.

Legend: E adapters, M modules, s directions of an adapter at a module.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from expertmix.experts.shelf import Shelf


def size(singular: Tensor) -> float:
    """‖Δ‖_F, the Frobenius norm of an update.

    Args:
        singular: (s,) its singular values.

    Returns:
        In units of the weight; 0 for an adapter that does nothing.
    """
    return float(singular.double().norm())


def effective_rank(singular: Tensor) -> float:
    """exp of the entropy of p_i = σ_i² / Σσ²: over how many directions the energy is spread.

    After Roy and Vetterli (The effective rank, EUSIPCO 2007), who take p_i = σ_i / Σσ; squared, as
    here, p_i is the share of ‖Δ‖_F² and weak directions count less.

    Args:
        singular: (s,) singular values.

    Returns:
        Between 1 and s; nan for an adapter that does nothing.
    """
    if not len(singular):
        return math.nan
    share = singular.double().square()
    share = share / share.sum()
    return math.exp(float(torch.special.entr(share).sum()))


def stable_rank(singular: Tensor) -> float:
    """‖Δ‖_F² / σ_1² (Rudelson and Vershynin, 2007): how far the first direction is from being all.

    Args:
        singular: (s,) singular values, falling.

    Returns:
        Between 1 and s; nan for an adapter that does nothing.
    """
    if not len(singular):
        return math.nan
    return float((singular.double() / singular[0].double()).square().sum())


@dataclass(frozen=True, eq=False)
class Ranks:
    """Sizes and ranks of all adapters at all modules.

    Attributes:
        names: E adapters.
        modules: M modules.
        rank: (E, M) directions that are not null; 0 where the adapter does nothing.
        size: (E, M) ‖Δ‖_F; 0 there.
        effective: (E, M) effective rank; nan there.
        stable: (E, M) stable rank; nan there.
    """

    names: tuple[str, ...]
    modules: tuple[str, ...]
    rank: Tensor
    size: Tensor
    effective: Tensor
    stable: Tensor

    @classmethod
    def of(cls, shelf: Shelf) -> Ranks:
        """Measure a shelf."""
        return cls(
            shelf.names,
            shelf.modules,
            _table(shelf, lambda singular: float(len(singular))).long(),
            _table(shelf, size),
            _table(shelf, effective_rank),
            _table(shelf, stable_rank),
        )

    @property
    def total_size(self) -> Tensor:
        """(E,) ‖Δ‖_F over all modules of each adapter together."""
        return self.size.square().sum(1).sqrt()

    @property
    def mean_effective(self) -> Tensor:
        """(E,) mean effective rank over the modules at which each adapter does something."""
        return self.effective.nanmean(1)


def _table(shelf: Shelf, measure: Callable[[Tensor], float]) -> Tensor:
    """(E, M) float64."""
    nothing, modules = measure(torch.zeros(0)), shelf.modules
    rows = [
        [
            measure(found.singular) if (found := adapter.modules.get(module)) else nothing
            for module in modules
        ]
        for adapter in shelf
    ]
    return torch.tensor(rows, dtype=torch.float64).reshape(len(shelf), len(modules))


def profile(shelf: Shelf) -> Tensor:
    """How fast singular values fall: mean of σ_i / σ_1 over an adapter's modules.

    Args:
        shelf: E adapters, of which one has r directions somewhere, and none more.

    Returns:
        (E, r) float64, falling from 1; 0 beyond an adapter's rank, nan where it does nothing.
    """
    highest = max((one.rank for adapter in shelf for one in adapter.modules.values()), default=0)
    rows = torch.zeros(len(shelf), highest, dtype=torch.float64)
    for row, adapter in zip(rows, shelf, strict=True):
        present = [one.singular.double() for one in adapter.modules.values() if one.rank]
        for singular in present:
            row[: len(singular)] += (singular / singular[0]).to(row.device)
        row /= len(present) or math.nan
    return rows
