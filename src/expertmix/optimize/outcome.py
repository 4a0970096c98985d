"""What became of one sample: `Outcome`.

Legend: O options, D decision tokens, L critical sites, E experts, k neighbors, T steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from expertmix.core.pathway import Mode
from expertmix.optimize.neighborhood import Neighborhood
from expertmix.optimize.samples import Sample


@dataclass(frozen=True, eq=False, slots=True)
class Outcome:
    """A sample with the base's routing and with another.

    Where nothing was changed, `dense` and `hard` are the base's scores, bit for bit.

    Attributes:
        number: Of the sample, in what `remix` was given.
        sample: The sample.
        base: (O,) scores with the base's routing.
        dense: (O,) scores with the new routing, all core experts called.
        hard: (O,) scores with the new routing, K experts called: what counts.
        changed: Whether the routing is another.
        reason: Why not, in words.
        start: (D, L, E) the base's pathway as logits.
        mass: (D, L) sums of its weights.
        values: (D or 1, L, E) logits that were found; None where nothing was changed.
        mode: Of the values: `set` or `add`.
        neighbors: Its neighborhood, a single row; None if the sample could not be read.
        losses: (T + 1,) surrogate, where the method has one.
        notes: More from the method, by name.
        seconds: Its share of the time of each stage of its batch.
    """

    number: int
    sample: Sample
    base: Tensor
    dense: Tensor
    hard: Tensor
    changed: bool
    reason: str
    start: Tensor
    mass: Tensor
    values: Tensor | None
    mode: Mode
    neighbors: Neighborhood | None
    losses: Tensor | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def correct(self) -> Mapping[str, bool | None]:
        """For `base`, `dense` and `hard`, whether the gold option wins; None where none is."""
        return {name: self._right(name) for name in ("base", "dense", "hard")}

    def answer(self, routing: str = "hard") -> int:
        """Number of the best option with `base`, `dense` or `hard` routing."""
        return int(self._scores(routing).argmax())

    def _scores(self, routing: str) -> Tensor:
        return {"base": self.base, "dense": self.dense, "hard": self.hard}[routing]

    def _right(self, routing: str) -> bool | None:
        return None if self.sample.gold is None else self.answer(routing) == self.sample.gold

    def row(self) -> dict[str, Any]:
        """Plain values for JSON and tables; None stands for what is not finite."""
        found = self.neighbors
        present = [] if found is None else found.present[0].tolist()
        return {
            "number": self.number,
            "name": self.sample.name,
            "gold": self.sample.gold,
            "changed": self.changed,
            "reason": self.reason,
            **{f"{name}_scores": plain(self._scores(name)) for name in ("base", "dense", "hard")},
            **{f"{name}_answer": self.answer(name) for name in ("base", "dense", "hard")},
            **{f"{name}_correct": right for name, right in self.correct.items()},
            "neighbors": [] if found is None else _kept(found.indices, present),
            "neighbor_weights": [] if found is None else _kept(found.weights, present),
            "neighbor_similarity": [] if found is None else _kept(found.similarity, present),
            "neighbor_distance": [] if found is None else _kept(found.distance, present),
            "near_duplicates": 0 if found is None else int(found.dropped[0]),
            "losses": plain(self.losses),
            "mode": self.mode,
            "start": plain(self.start),
            "mass": plain(self.mass),
            "values": plain(self.values),
            "notes": plain(dict(self.notes)),
            "seconds": dict(self.seconds),
        }


def plain(value: Any) -> Any:
    """JSON-ready: tensors as lists, and None for numbers that JSON does not have."""
    if isinstance(value, Tensor):
        return plain(value.detach().cpu().tolist())
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, int | str | None) else str(value)


def _kept(values_1k: Tensor, present: list[bool]) -> list[Any]:
    kept = zip(values_1k[0].tolist(), present, strict=True)
    return [plain(value) for value, there in kept if there]
