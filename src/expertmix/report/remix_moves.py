"""How routing moved on average: `Moved`, means over the items whose pathway was changed.

Legend: L critical sites, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from expertmix.report.remix_data import Move, RemixItem

Rows = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class Moved:
    """Means over moves; an item that was asked in several orders counts once per order.

    Attributes:
        moves: How many.
        before: (L, E) the base's weights.
        after: (L, E) the new ones.
        entropy_before: (L,) mean entropy in nats of a move's weights, as shares, before.
        entropy_after: (L,) the same after.
        kl: (L,) mean divergence from the base, in nats.
        exchanged: (L,) mean number of experts that came in.
    """

    moves: int
    before: Rows
    after: Rows
    entropy_before: tuple[float, ...]
    entropy_after: tuple[float, ...]
    kl: tuple[float, ...]
    exchanged: tuple[float, ...]

    @classmethod
    def of(cls, items: Sequence[RemixItem], experts: int) -> Moved | None:
        """Of some items; None where no routing was changed.

        Args:
            items: Of one routing.
            experts: E.
        """
        moves = [turn.move for one in items for turn in one.turns if turn.move is not None]
        if not moves:
            return None
        sites = range(len(moves[0].before))
        return cls(
            len(moves),
            tuple(_means([move.before[site] for move in moves], experts) for site in sites),
            tuple(_means([move.after[site] for move in moves], experts) for site in sites),
            tuple(_mean([entropy(move.before[site]) for move in moves]) for site in sites),
            tuple(_mean([entropy(move.after[site]) for move in moves]) for site in sites),
            tuple(_mean([move.kl[site] for move in moves]) for site in sites),
            tuple(_mean([float(len(incoming(move, site))) for move in moves]) for site in sites),
        )

    @property
    def difference(self) -> Rows:
        """(L, E) after minus before."""
        return tuple(
            tuple(b - a for a, b in zip(one, other, strict=True))
            for one, other in zip(self.before, self.after, strict=True)
        )


def incoming(move: Move, site: int) -> list[int]:
    """Experts that the base did not call at a site, and the new routing does."""
    return [expert for expert in move.after[site] if expert not in move.before[site]]


def entropy(weights: Mapping[int, float]) -> float:
    """−Σ p log p of weights as shares, in nats; nan where there are none."""
    total = sum(weights.values())
    if not total > 0:
        return math.nan
    shares = [weight / total for weight in weights.values() if weight > 0]
    return -sum(share * math.log(share) for share in shares)


def _means(rows: Sequence[Mapping[int, float]], experts: int) -> tuple[float, ...]:
    sums = [0.0] * experts
    for row in rows:
        for expert, weight in row.items():
            sums[expert] += weight
    return tuple(value / len(rows) for value in sums)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
