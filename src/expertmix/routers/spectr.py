"""SpectR (arXiv 2504.03454): adapters are scored by how much of the input they read.

Legend: T tokens, E adapters, R directions of all adapters, m candidates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from expertmix.errors import ConfigError
from expertmix.routers.router import Router
from expertmix.routers.rule import Rule, scored
from expertmix.routers.seen import Seen

Score = Literal["projection", "energy"]
Normalization = Literal["input", "rank", "size"]


@dataclass(frozen=True)
class SpectR(Router):
    """Training-free spectral routing, with scale * B_i @ A_i = U_i S_i V_iᵀ.

    Attributes:
        score: `projection` is ‖V_iᵀ x‖ (the authors' code), `energy` is ‖S_i V_iᵀ x‖, the length of
            the adapter's output (SEQR, arXiv 2509.18093, reads the paper so).
        normalize: What scores are divided by: `input` by ‖x‖, `rank` by √r_i (projections grow with
            it: E‖Vᵀx‖² ≈ r/D ‖x‖²), `size` by ‖S_i‖ (else the largest adapter has the most energy).
        top_k: Adapters per token; None for all.
        temperature: Of the softmax.
        weights: `uniform` over the selected (the authors' code) or their `softmax`.

    Raises:
        ConfigError: A value that is not possible.
    """

    score: Score = "projection"
    normalize: tuple[Normalization, ...] = ()
    top_k: int | None = 3
    temperature: float = 1.0
    weights: Literal["uniform", "softmax"] = "uniform"

    def __post_init__(self) -> None:
        if self.score not in ("projection", "energy"):
            raise ConfigError(f"score must be projection or energy: {self.score!r}")
        if isinstance(self.normalize, str):
            object.__setattr__(self, "normalize", (self.normalize,))
        object.__setattr__(self, "normalize", tuple(self.normalize))
        if unknown := [name for name in self.normalize if name not in _DIVISORS]:
            raise ConfigError(f"normalize knows {', '.join(_DIVISORS)}, not {unknown[0]!r}")
        _ = self.rule

    @property
    def rule(self) -> Rule:
        """Top-k of the norms."""
        return scored(self.top_k, self.weights, self.temperature)

    def scores(self, seen: Seen) -> Tensor:
        """(T, E) norms of the projections, or of the adapters' outputs."""
        directions = seen.directions
        values_TR = seen.projected
        if self.score == "energy":
            values_TR = values_TR * directions.singular  # at least float32, as those are
        # not minus infinity for who is absent: divided, it would spoil the others' gradients
        return self._divided(directions.norms(values_TR, absent=0.0), seen)

    @property
    def whole(self) -> bool:
        """Every direction counts."""
        return True

    def among(self, seen: Seen, candidates: Tensor) -> Tensor:
        """(T, m) of the same, from the directions of the candidates alone."""
        norms_Tm = seen.norms(candidates, energy=self.score == "energy")
        return self._divided(norms_Tm, seen, candidates)

    def _divided(self, scores: Tensor, seen: Seen, candidates: Tensor | None = None) -> Tensor:
        for name in self.normalize:
            divisor = _DIVISORS[name](seen)
            if candidates is not None and divisor.dim() == 1:  # per adapter, not per token
                divisor = divisor[candidates]
            scores = scores / divisor
        return scores


def _input(seen: Seen) -> Tensor:
    """(T, 1) ‖x‖; never zero."""
    dtype = torch.promote_types(seen.hidden.dtype, torch.float32)
    norms_T1: Tensor = torch.linalg.vector_norm(seen.hidden, dim=1, keepdim=True, dtype=dtype)
    return norms_T1.clamp(min=torch.finfo(dtype).tiny)


def _rank(seen: Seen) -> Tensor:
    return seen.directions.ranks.sqrt()


def _size(seen: Seen) -> Tensor:
    return seen.directions.sizes


_DIVISORS: dict[str, Callable[[Seen], Tensor]] = {"input": _input, "rank": _rank, "size": _size}
