"""What was decided: the experts that each token got at one site, and their weights.

Legend: N tokens, K selected experts, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from expertmix.core.site import SiteInfo


@dataclass(frozen=True, eq=False, slots=True)
class Decision:
    """Weights over experts for N tokens at a site; sparse by contract.

    Attributes:
        indices: (N, K) int64, the selected experts. -1 where a token had fewer than K.
        weights: (N, K), the weight that each selected expert's output got. 0 where ablated.
        num_experts: E.
        logits: (N, E), what the gate's linear map gave, or None where they were not recorded.
    """

    indices: Tensor
    weights: Tensor
    num_experts: int
    logits: Tensor | None = None

    def __len__(self) -> int:
        return self.indices.shape[0]

    @property
    def top_k(self) -> int:
        """K."""
        return self.indices.shape[1]

    def dense(self) -> Tensor:
        """(N, E) weights, zero for experts that were not selected; differentiable."""
        present_NK = self.indices >= 0
        dense_NE = self.weights.new_zeros(len(self), self.num_experts)
        return dense_NE.scatter_add(
            1, self.indices.clamp(min=0), self.weights * present_NK.to(self.weights.dtype)
        )

    def chosen(self) -> Tensor:
        """(N, E) bool: the expert was selected and its weight is not zero."""
        return self.dense() != 0

    def rows(self, keep: Tensor) -> Decision:
        """The decision for some tokens: a (N,) bool mask or a vector of row numbers."""
        logits = None if self.logits is None else self.logits[keep]
        return Decision(self.indices[keep], self.weights[keep], self.num_experts, logits)

    def equal(self, other: Decision) -> bool:
        """Same experts and same weights, bit for bit."""
        return (
            self.num_experts == other.num_experts
            and torch.equal(self.indices, other.indices)
            and torch.equal(self.weights, other.weights)
        )


def none(tokens: int, info: SiteInfo) -> Decision:
    """No decision: every slot is -1 with weight 0."""
    indices = torch.full((tokens, info.top_k), -1)
    return Decision(indices, torch.zeros(tokens, info.top_k), info.num_experts)


def concatenate(parts: list[Decision]) -> Decision:
    """Join decisions of one site along the token axis; narrower parts are filled with -1."""
    if len(parts) == 1:
        return parts[0]
    top_k = max(part.top_k for part in parts)
    logits = [part.logits for part in parts if part.logits is not None]
    return Decision(
        torch.cat([fit(part.indices, top_k, -1) for part in parts]),
        torch.cat([fit(part.weights, top_k, 0) for part in parts]),
        parts[0].num_experts,
        torch.cat(logits) if len(logits) == len(parts) else None,
    )


def fit(values_NK: Tensor, width: int, fill: int) -> Tensor:
    """(N, width): slots cut off, or added and filled."""
    return torch.nn.functional.pad(values_NK, (0, width - values_NK.shape[1]), value=fill)
