"""The directions that adapters read at a module, and projections on them.

The right singular vectors of all adapters at one module lie side by side in one matrix, so that one
product with the hidden states serves every score, and the down-projection too. Where only a few
adapters per token are asked for, only those are multiplied. Adapters of equal rank lie together in
a *band*: there a score is a norm over equal blocks.

Knows no model, no file and no left side of an adapter.

Legend: T tokens, D width of the module's input, E adapters, R directions of all adapters together,
n adapters of a band, r their rank, or the highest one; m adapters of a token, N pairs of both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from expertmix.routers.pairs import Pairs

ABSENT = float("-inf")
"""The score of an adapter that does nothing at a module: no router chooses it."""
SORTED = 8
"""With more tokens per adapter than so many, a product per adapter is faster than single dots."""
FEW = 128
"""So many pairs of token and adapter, where `_dots` cannot be, are copied and not yet sorted."""
GATHERED = 1 << 17
"""So many numbers of hidden states are gathered at once: they stay in the second cache."""


def _dots_of_rows() -> Callable[..., Tensor] | None:
    """PyTorch's operator behind `_dots`; it is private, so a version may be without it."""
    name = "_embedding_bag_per_sample_weights_backward"
    operator: Callable[..., Tensor] | None = getattr(torch.ops.aten, name, None)
    return operator


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
        right: (D, R) right singular vectors v of scale * B @ A, columns of unit length; each should
            lie in one piece: a transposed (R, D).
        singular: (R,) their singular values in float32 or better; falling within an adapter.
        bands: Which directions are whose. An adapter in no band does nothing here: B = 0, or it
            does not adapt the module.
        names: Names of the E adapters.
        coarse: Norms are as coarse as the directions: they only say who may be among the highest.
        owner: (R,) whose direction it is.
        available: (E,) bool: the adapter does something here.
        ranks: (E,) directions of each adapter; 1 where it has none.
        sizes: (E,) Frobenius norm of each adapter's update; 1 where it does nothing.
        rows: (E, r) each adapter's directions among the R, and 0 where it has fewer than r.
        filled: (E, r) which of them are the adapter's, or None where all are.
    """

    right: Tensor
    singular: Tensor
    bands: tuple[Band, ...]
    names: tuple[str, ...]
    coarse: bool = False
    owner: Tensor = field(init=False)
    available: Tensor = field(init=False)
    ranks: Tensor = field(init=False)
    sizes: Tensor = field(init=False)
    rows: Tensor = field(init=False)
    filled: Tensor | None = field(init=False)
    _order: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # Made here and not when first asked for: that may be in inference mode, whose tensors
        # cannot take part in a later backward.
        made = {"owner": self._owner(), "ranks": self._ranks(), "_order": self._places()}
        made["available"] = made["ranks"] > 0
        made["ranks"] = made["ranks"].clamp(min=1)
        made["rows"], filled_Er = self._rows()
        for name, value in made.items():
            object.__setattr__(self, name, value.to(self.right.device))
        whole = bool(filled_Er.all())
        object.__setattr__(self, "filled", None if whole else filled_Er.to(self.right.device))
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

    def _rows(self) -> tuple[Tensor, Tensor]:
        highest = max(band.rank for band in self.bands)
        rows_Er = torch.zeros(len(self.names), highest, dtype=torch.int64)
        filled_Er = torch.zeros(len(self.names), highest, dtype=torch.bool)
        for band in self.bands:
            own = torch.arange(band.start, band.stop).view(len(band.experts), band.rank)
            rows_Er[list(band.experts), : band.rank] = own
            filled_Er[list(band.experts), : band.rank] = True
        return rows_Er, filled_Er

    @cached_property
    def places(self) -> tuple[slice, ...]:
        """Where each adapter's directions lie among the R; an empty slice where it has none."""
        places = [slice(0, 0)] * len(self.names)
        for band in self.bands:
            for number, expert in enumerate(band.experts):
                start = band.start + number * band.rank
                places[expert] = slice(start, start + band.rank)
        return tuple(places)

    @cached_property
    def _first(self) -> Tensor:
        """(D, n of all bands) the strongest direction of each adapter."""
        starts = [torch.arange(band.start, band.stop, band.rank) for band in self.bands]
        with torch.inference_mode(False):  # see __post_init__
            return self.right.T[torch.cat(starts).to(self.right.device)].T.contiguous()

    @cached_property
    def _singular(self) -> Tensor:
        """(E, r) singular values, and 0 where an adapter has fewer than r."""
        with torch.inference_mode(False):
            return self.masked(self.singular[self.rows])

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
        return hidden.to(self.right.dtype) @ self.right

    def norms(self, values: Tensor, *, absent: float = ABSENT) -> Tensor:
        """(T, E) the length of each adapter's block of (T, R) values, in float32 or better."""
        # A native norm adds up in float32 anyway; asking for that type makes a copy first.
        dtype = None if self.coarse else torch.promote_types(values.dtype, torch.float32)
        found = [
            torch.linalg.vector_norm(block_Tnr, dim=-1, dtype=dtype)
            for block_Tnr in self.blocks(values)
        ]
        norms_TE = self._spread(found, absent)
        return norms_TE.to(torch.promote_types(norms_TE.dtype, torch.float32))

    def strongest(self, hidden: Tensor) -> Tensor:
        """(T, E) |v_i1·x|, from (T, D) hidden states and those directions alone."""
        first_Tn = (hidden.to(self._first.dtype) @ self._first).abs()
        first_Tn = first_Tn.to(torch.promote_types(first_Tn.dtype, torch.float32))
        sizes = [len(band.experts) for band in self.bands]
        return self._spread(torch.split(first_Tn, sizes, 1), ABSENT)

    def apart(self, tokens: int, width: int) -> bool:
        """Whether `some` of so many adapters per token is faster than `project`ing on all.

        By measurement on one CPU core: a product per adapter costs about eight times what its part
        of the large product does, single dots twice as much again.
        """
        share = 8 if tokens * width > SORTED * self.count else 16
        return self.count >= share * width

    def some(self, hidden: Tensor, indices: Tensor) -> Tensor:
        """(T, m, r) v·x of m adapters per token; 0 where one has fewer directions than r."""
        hidden, pairs = hidden.to(self.right.dtype), indices.numel()
        graph = torch.is_grad_enabled() and hidden.requires_grad
        dots = not graph and hidden.device.type == "cpu" and _dots_of_rows() is not None
        if pairs > (SORTED * self.count if dots else FEW):
            return self._sorted(hidden, indices)
        return (self._dots if dots else self._copied)(hidden, indices)

    def _sorted(self, hidden: Tensor, indices: Tensor) -> Tensor:
        """A product per adapter."""
        pairs, rights = Pairs.of(indices), self._each()
        found = [
            self._filled_up(functional.linear(part_nD, rights[expert]))
            for expert, part_nD in pairs.parts(hidden, GATHERED // hidden.shape[1])
        ]
        return pairs.unsorted(torch.cat(found)).view(*indices.shape, -1)

    def _dots(self, hidden: Tensor, indices: Tensor) -> Tensor:
        """Dot products of rows where they lie, in one call; without a graph, on a CPU."""
        rows_Tmr = self.rows[indices]
        bags_T = torch.arange(len(rows_Tmr)) * rows_Tmr.shape[1] * rows_Tmr.shape[2]
        # What a sum of weighted rows gives its weights as their gradient: just these products.
        operator = _dots_of_rows()
        assert operator is not None, "some asks first"
        dots_N: Tensor = operator(
            hidden.contiguous(), self.right.T, rows_Tmr.flatten(), bags_T, bags_T[:0], 0
        )
        return self.masked(dots_N.view_as(rows_Tmr), indices)

    def _each(self) -> Sequence[Tensor]:
        """(r, D) directions of each adapter."""
        if self.regular:
            return torch.split(self.right.T, self.bands[0].rank)
        return [self.right.T[place] for place in self.places]

    def _filled_up(self, values: Tensor) -> Tensor:
        """(n, r) from as many columns as an adapter has directions; zeros beyond."""
        missing = self.rows.shape[1] - values.shape[1]
        return functional.pad(values, (0, missing)) if missing else values

    def _copied(self, hidden: Tensor, indices: Tensor) -> Tensor:
        """As `_dots`, from a copy of the rows."""
        rows_Tmr = self.rows[indices]
        tokens, adapters, rank = rows_Tmr.shape  # sizes in full: there may be no token
        right_TqD = self.right.T.index_select(0, rows_Tmr.flatten()).view(
            tokens, adapters * rank, hidden.shape[1]
        )
        return self.masked(torch.bmm(right_TqD, hidden[..., None]).view_as(rows_Tmr), indices)

    def masked(self, values: Tensor, indices: Tensor | None = None) -> Tensor:
        """(…, r) values of all adapters, or of those named by (…), 0 beyond their ranks."""
        if self.filled is None:
            return values
        return values * (self.filled if indices is None else self.filled[indices])

    def singular_of(self, indices: Tensor) -> Tensor:
        """(…, r) singular values of the adapters named by (…)."""
        return self._singular[indices]

    def blocks(self, values: Tensor) -> Sequence[Tensor]:
        """(T, n, r) per band, views of (T, R) values."""
        return [
            values[:, band.start : band.stop].view(-1, len(band.experts), band.rank)
            for band in self.bands
        ]

    def _spread(self, parts: Sequence[Tensor], fill: float) -> Tensor:
        """(T, E) from one (T, n) per band; `fill` for adapters in no band."""
        if self.regular:
            return parts[0]
        idle = len(self.names) - self.count
        filler = [parts[0].new_full((len(parts[0]), 1), fill)] if idle else []
        return torch.cat([*parts, *filler], 1).index_select(1, self._order)
