"""A pass at one module, as a router sees it: nothing is multiplied before it is asked for.

Lives as long as the pass. Knows no router and no model.

Legend: T tokens, D width of the module's input, E adapters, R directions of all adapters together,
m adapters of a token, r the highest rank.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from expertmix.routers.directions import Directions
from expertmix.routers.memory import Memory


class Seen:
    """What a router sees of one pass at one module.

    Args:
        hidden: (T, D) the module's input.
        directions: What the adapters read there.
        module: Name of the module.
        rows: Rows of the batch; token t stands in row t // (T / rows).
        product: Gives `directions.project(hidden)`, where it may be shared with other modules.
        rough: The same pass in a coarser type: good enough to say who cannot be among the highest.
            None where scores are exact, or cheap, from the start.

    Attributes:
        memory: Of the whole pass, for a router that has one; set by whoever runs the pass.
    """

    def __init__(
        self,
        hidden: Tensor,
        directions: Directions,
        *,
        module: str = "",
        rows: int = 1,
        product: Callable[[], Tensor] | None = None,
        rough: Seen | None = None,
    ) -> None:
        self.hidden = hidden
        self.directions = directions
        self.module = module
        self.rows = rows
        self.rough = rough
        self.memory: Memory | None = None
        self._product = product
        self._projected: Tensor | None = None
        self._some: tuple[Tensor, Tensor] | None = None

    @property
    def projected(self) -> Tensor:
        """(T, R) v·x for every direction: what costs most."""
        if self._projected is None:
            make = self._product
            self._projected = self.directions.project(self.hidden) if make is None else make()
        return self._projected

    @property
    def first(self) -> Tensor:
        """(T, E) |v_i1·x|, of 1/r of the cost."""
        return self.directions.strongest(self.hidden)

    def some(self, indices: Tensor) -> Tensor:
        """(T, m, r) v·x of m adapters per token, 0 beyond an adapter's rank.

        From what is there already, if it is; else of these adapters alone, where that is faster.
        """
        if self._some is not None and self._some[0] is indices:
            return self._some[1]
        if self._projected is None and self.directions.apart(*indices.shape):
            values_Tmr = self.directions.some(self.hidden, indices)
        else:
            rows_Tmr = self.directions.rows[indices]
            values_Tq = self.projected.gather(1, rows_Tmr.flatten(1))
            values_Tmr = self.directions.masked(values_Tq.view_as(rows_Tmr), indices)
        self._some = (indices, values_Tmr)
        return values_Tmr

    def narrowed(self, candidates: Tensor, places: Tensor) -> Tensor:
        """(T, K) adapters, those at (T, K) places among (T, m) candidates; their `some` is kept."""
        indices_TK = candidates.gather(1, places)
        if self._some is not None and self._some[0] is candidates:
            values_Tmr = self._some[1]
            places_TKr = places[..., None].expand(-1, -1, values_Tmr.shape[2])
            self._some = (indices_TK, values_Tmr.gather(1, places_TKr))
        return indices_TK

    def norms(self, indices: Tensor, *, energy: bool = False) -> Tensor:
        """(T, m) ‖V_iᵀ x‖, or ‖S_i V_iᵀ x‖, of m adapters per token, in float32 or better."""
        values_Tmr = self.some(indices)
        if energy:
            values_Tmr = values_Tmr * self.directions.singular_of(indices)
        dtype = torch.promote_types(values_Tmr.dtype, torch.float32)
        found: Tensor = torch.linalg.vector_norm(values_Tmr, dim=-1, dtype=dtype)
        return found
