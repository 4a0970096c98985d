"""What routers look at: the directions that adapters read at a module, and a pass seen along them.

The right singular vectors of all adapters at one module lie side by side in one matrix, so that one
product with the hidden states serves every score, and the down-projection too. Adapters of equal
rank lie together in a *band*: there a score is a norm over equal blocks.

Knows no model, no file and no left side of an adapter.

Legend: T tokens, D width of the module's input, E adapters, R directions of all adapters together,
n adapters of a band, r their rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

ABSENT = float("-inf")
"""The score of an adapter that does nothing at a module: no router chooses it."""


@dataclass(frozen=True)
class Band:
    """Adapters of equal rank, whose directions lie together.

    Attributes:
        experts: Their n numbers.
        rank: r, directions of each.
        start: The first of their n * r directions; adapter after adapter, the strongest first.
    """

    experts: tuple[int, ...]
    rank: int
    start: int

    @property
    def stop(self) -> int:
        """One behind the last."""
        return self.start + len(self.experts) * self.rank


@dataclass(frozen=True, eq=False)
class Directions:
    """What E adapters read at one module.

    Attributes:
        right: (D, R) right singular vectors v of scale * B @ A, columns of unit length.
        singular: (R,) their singular values in float32 or better; falling within an adapter.
        bands: Which directions are whose. An adapter in no band does nothing here: B = 0, or it
            does not adapt the module.
        names: Names of the E adapters.
        owner: (R,) whose direction it is.
        available: (E,) bool: the adapter does something here.
        ranks: (E,) directions of each adapter; 1 where it has none.
        sizes: (E,) Frobenius norm of each adapter's update; 1 where it does nothing.
    """

    right: Tensor
    singular: Tensor
    bands: tuple[Band, ...]
    names: tuple[str, ...]
    owner: Tensor = field(init=False)
    available: Tensor = field(init=False)
    ranks: Tensor = field(init=False)
    sizes: Tensor = field(init=False)
    _order: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # Made here and not when first asked for: that may be in inference mode, whose tensors
        # cannot take part in a later backward.
        made = {"owner": self._owner(), "ranks": self._ranks(), "_order": self._places()}
        made["available"] = made["ranks"] > 0
        made["ranks"] = made["ranks"].clamp(min=1)
        for name, value in made.items():
            object.__setattr__(self, name, value.to(self.right.device))
        object.__setattr__(self, "sizes", self.norms(self.singular[None], absent=1.0)[0])

    def _owner(self) -> Tensor:
        parts = [torch.tensor(band.experts).repeat_interleave(band.rank) for band in self.bands]
        return torch.cat(parts)

    def _ranks(self) -> Tensor:
        ranks_E = torch.zeros(len(self.names), dtype=self.singular.dtype)
        for band in self.bands:
            ranks_E[list(band.experts)] = band.rank
        return ranks_E

    def _places(self) -> Tensor:
        """(E,) where each adapter stands, band after band; idle ones behind all of them."""
        places_E = torch.full((len(self.names),), self.count)
        listed = [expert for band in self.bands for expert in band.experts]
        places_E[listed] = torch.arange(self.count)
        return places_E

    @property
    def regular(self) -> bool:
        """All adapters have the same rank: they lie in one band, in order."""
        return len(self.bands) == 1 and self.count == len(self.names)

    @property
    def count(self) -> int:
        """How many adapters do something here."""
        return sum(len(band.experts) for band in self.bands)

    def project(self, hidden: Tensor) -> Tensor:
        """(T, R) v·x for every direction, from (T, D) hidden states."""
        return hidden @ self.right

    def norms(self, values: Tensor, *, absent: float = ABSENT) -> Tensor:
        """(T, E) the length of each adapter's block of (T, R) values, in float32 or better."""
        dtype = torch.promote_types(values.dtype, torch.float32)
        return self._per_expert(
            values, lambda block_Tnr: torch.linalg.vector_norm(block_Tnr, dim=-1, dtype=dtype),
            absent,
        )  # fmt: skip

    def strongest(self, values: Tensor) -> Tensor:
        """(T, E) absolute value along each adapter's first direction, from (T, R) values."""
        dtype = torch.promote_types(values.dtype, torch.float32)
        return self._per_expert(values, lambda block_Tnr: block_Tnr[..., 0].abs().to(dtype), ABSENT)

    def blocks(self, values: Tensor) -> Sequence[Tensor]:
        """(T, n, r) per band, views of (T, R) values."""
        return [
            values[:, band.start : band.stop].view(-1, len(band.experts), band.rank)
            for band in self.bands
        ]

    def _per_expert(
        self, values: Tensor, measure: Callable[[Tensor], Tensor], absent: float
    ) -> Tensor:
        found = [measure(block_Tnr) for block_Tnr in self.blocks(values)]
        return self._spread(found, absent)

    def _spread(self, parts: Sequence[Tensor], fill: float) -> Tensor:
        """(T, E) from one (T, n) per band; `fill` for adapters in no band."""
        if self.regular:
            return parts[0]
        idle = len(self.names) - self.count
        filler = [parts[0].new_full((len(parts[0]), 1), fill)] if idle else []
        return torch.cat([*parts, *filler], 1).index_select(1, self._order)


@dataclass(frozen=True, eq=False)
class Seen:
    """What a router sees of one pass at one module.

    Attributes:
        hidden: (T, D) the module's input.
        projected: (T, R) `directions.project(hidden)`.
        directions: What the adapters read there.
        module: Name of the module.
        rows: Rows of the batch; token t stands in row t // (T / rows).
    """

    hidden: Tensor
    projected: Tensor
    directions: Directions
    module: str = ""
    rows: int = 1

    @classmethod
    def of(cls, directions: Directions, hidden: Tensor, *, module: str = "", rows: int = 1) -> Seen:
        """Hidden states (T, D), projected here."""
        return cls(hidden, directions.project(hidden), directions, module, rows)
