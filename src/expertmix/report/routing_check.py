"""Whether texts reach the expert of their own name: `RoutingCheck`, given to a report as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class RoutingCheck:
    """Labels against experts, as the caller counted them.

    Attributes:
        experts: Names of the E experts.
        shares: By label, the share of its tokens that went to each expert.
        tokens: Share of tokens that went to the expert of their text's label.
        texts: Share of texts that as a whole gave most weight to that expert.
        layers: That of tokens, by layer, in the model's order.
        kinds: That of tokens, by kind of module.
    """

    experts: tuple[str, ...]
    shares: Mapping[str, Sequence[float]]
    tokens: float
    texts: float
    layers: Mapping[str, float] = field(default_factory=dict)
    kinds: Mapping[str, float] = field(default_factory=dict)

    @property
    def chance(self) -> float:
        """How often a router without preference is right: 1 / E."""
        return 1 / len(self.experts)
