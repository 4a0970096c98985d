"""The gate: whose routing is changed at all.

A sample that the base decides clearly has little to gain and something to lose; one whose neighbors
are far, or disagree on how to route, has nothing to go by. Such samples keep the base's routing,
and the reason is told in words.

Knows scores, distances and pathways; no model.

Legend: B samples, N references, k neighbors, O options, X = D · L · E.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from expertmix.errors import ConfigError
from expertmix.optimize.neighborhood import Neighborhood
from expertmix.optimize.neighbors import Finder

_PROBED = 1000  # references whose nearest neighbor is looked for


@dataclass(frozen=True, slots=True)
class Gate:
    """Conditions on which a sample is adapted; by default there are none.

    Attributes:
        max_margin: The base's score of its best option may exceed that of the second by so much,
            in the units of the scores. A sample with one option has no margin, and passes.
        max_distance: Quantile, above 0 and up to 1, of the distances between references and their
            own nearest neighbors: a sample whose nearest neighbor is farther away is refused.
        min_agreement: Least mean cosine, from −1 to 1, between its neighbors' pathways; see
            `agreement`. A sample with fewer than two neighbors passes.

    Raises:
        ConfigError: An impossible setting.
    """

    max_margin: float | None = None
    max_distance: float | None = None
    min_agreement: float | None = None

    def __post_init__(self) -> None:
        if self.max_distance is not None and not 0 < self.max_distance <= 1:
            raise ConfigError(
                f"max_distance={self.max_distance}: it is a quantile of the references' own "
                f"distances, above 0 and up to 1"
            )
        if self.min_agreement is not None and not -1 <= self.min_agreement <= 1:
            raise ConfigError(f"min_agreement={self.min_agreement}: it is a cosine, from -1 to 1")
        if self.max_margin is not None and not self.max_margin >= 0:
            raise ConfigError(f"max_margin={self.max_margin}: it must be at least 0")


NO_GATE = Gate()


class Keeper:
    """A gate, ready for one reference set.

    Args:
        gate: The conditions.
        finder: The reference set, with the metric and filters that distances are measured with.
    """

    def __init__(self, gate: Gate, finder: Finder) -> None:
        self.gate, self._finder = gate, finder

    def reasons(self, scores: Sequence[Tensor], found: Neighborhood) -> list[str]:
        """Per sample why it is refused, empty where it is adapted.

        Args:
            scores: Per sample the base's (O,) scores.
            found: Its neighbors.
        """
        agreement_B = self._agreement(found)
        return [
            self._margin(one) or self._distance(found, row) or self._disagreement(agreement_B[row])
            for row, one in enumerate(scores)
        ]

    @cached_property
    def farthest(self) -> float:
        """The distance from which on a nearest neighbor is too far."""
        assert self.gate.max_distance is not None
        return own_distance(self._finder, self.gate.max_distance)

    def _margin(self, scores_O: Tensor) -> str:
        most = self.gate.max_margin
        if most is None or len(scores_O) < 2:
            return ""
        margin = margin_of(scores_O)
        return "" if margin <= most else f"not fragile: margin {margin:.4g} is above {most:.4g}"

    def _distance(self, found: Neighborhood, row: int) -> str:
        if self.gate.max_distance is None:
            return ""
        if not bool(found.present[row].any()):
            return "no neighbors"
        distance = float(found.distance[row].min())
        if distance <= self.farthest:
            return ""
        return (
            f"too far: the nearest neighbor is at {distance:.4g}, references have theirs within "
            f"{self.farthest:.4g} (quantile {self.gate.max_distance:g})"
        )

    def _disagreement(self, agreement: float) -> str:
        least = self.gate.min_agreement
        if least is None or agreement >= least:
            return ""
        return f"neighbors disagree: mean cosine {agreement:.4g} of pathways is below {least:.4g}"

    def _agreement(self, found: Neighborhood) -> list[float]:
        reference = self._finder.reference
        if self.gate.min_agreement is None or not found.indices.numel() or not len(reference):
            return [1.0] * len(found)
        away_BkX = self._deviations[found.indices.clamp(min=0)]
        return agreement(away_BkX, found.present).tolist()

    @cached_property
    def _deviations(self) -> Tensor:
        own_NX = self._finder.reference.start.softmax(-1).flatten(1)
        return own_NX - own_NX.mean(0)


def agreement(vectors_BkX: Tensor, present_Bk: Tensor) -> Tensor:
    """(B,) mean cosine over all pairs of a sample's neighbors; 1 with fewer than two.

    Args:
        vectors_BkX: What should agree: deviations of the neighbors' pathways (as distributions over
            experts) from the reference set's mean; or gradients, one per neighbor.
        present_Bk: Which neighbors there are.
    """
    unit_BkX = functional.normalize(vectors_BkX.double(), dim=-1) * present_Bk[..., None]
    count_B = present_Bk.sum(1).double()
    pairs_B = unit_BkX.sum(1).square().sum(-1) - unit_BkX.square().sum((1, 2))
    return torch.where(count_B > 1, pairs_B / (count_B * (count_B - 1)).clamp(min=1), 1.0)


def margin_of(scores_O: Tensor) -> float:
    """How far the best option is ahead of the second."""
    best = scores_O.topk(2).values
    return float(best[0] - best[1])


def own_distance(finder: Finder, quantile: float) -> float:
    """Quantile of the distances from references to their own nearest neighbors.

    Of at most a thousand references, evenly spaced in the set; near-duplicates are left out as for
    samples. Infinite where no reference has a neighbor: then nothing is too far.
    """
    reference = finder.reference
    step = -(-len(reference) // _PROBED)
    numbers = list(range(0, len(reference), max(1, step)))
    nearest = Finder(reference, finder.settings.nearest_one(), finder.index).find(
        reference.embeddings[numbers], without=numbers
    )
    found = nearest.distance[nearest.present]
    if not len(found):
        return float("inf")
    return float(found.double().quantile(quantile, interpolation="lower"))
