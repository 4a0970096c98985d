"""What a method is given and what it returns: `Problem`, `Method`, `Solution`.

Legend: B test samples, D decision tokens, L critical sites, E experts, N references, k neighbors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from expertmix.core.pathway import Mode, Pathways, Reading
from expertmix.core.progress import Progress, quiet
from expertmix.optimize.samples import Sample

if TYPE_CHECKING:
    from expertmix.optimize.neighborhood import Neighborhood
    from expertmix.optimize.neighbors import Finder
    from expertmix.optimize.reference import ReferenceSet


@dataclass(frozen=True, eq=False, slots=True)
class Problem:
    """Test samples, and all that is known of them before anything is optimized.

    Attributes:
        pathways: The model, open.
        samples: The B test samples. Methods that need no labels must not look at `gold`.
        readings: What a plain pass gave for each.
        start: (B, D, L, E) the base's pathway as logits: its top K are the experts that the router
            chose, and their softmax is proportional to their weights.
        mass: (B, D, L) sum of the base's weights.
        neighbors: Who is similar: numbers of references and kernel weights, per sample.
        finder: Found them; what it leaves out as near-duplicates, every method leaves out.
    """

    pathways: Pathways
    samples: Sequence[Sample]
    readings: Sequence[Reading]
    start: Tensor
    mass: Tensor
    neighbors: Neighborhood
    finder: Finder

    @property
    def reference(self) -> ReferenceSet:
        """The reference set that the neighbors' numbers count in."""
        return self.finder.reference


@dataclass(frozen=True, eq=False, slots=True)
class Solution:
    """Pathways that a method found.

    Attributes:
        values: (B, D or 1, L, E) logits; see `core.pathway.Pathway`.
        mode: `set` or `add`.
        changed: (B,) bool: False where the method left the base's routing alone.
        losses: (steps + 1, B) surrogate before the first step and after each, where it has one.
        core: Experts that a decision token calls in dense scores, as while it was optimized; None
            for all that the values leave in.
        reasons: Per sample why it was left alone, where the method knows, else an empty text; may
            be left out.
        notes: More per sample, by name, such as the α of kernel regression: (B,) or (B, …).
    """

    values: Tensor
    mode: Mode
    changed: Tensor
    losses: Tensor | None = None
    core: int | None = None
    reasons: Sequence[str] = ()
    notes: Mapping[str, Any] = field(default_factory=dict)


class Method(Protocol):
    """Finds better pathways. A frozen dataclass whose fields are its settings."""

    @property
    def name(self) -> str:
        """In tables and on the command line, such as `ngd`."""

    @property
    def mode(self) -> Mode:
        """Mode of the pathways that it returns."""

    def solve(self, problem: Problem, progress: Progress = quiet) -> Solution:
        """Pathways for all samples of a problem; samples do not influence each other."""
