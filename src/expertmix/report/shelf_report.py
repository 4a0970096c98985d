"""What is reported of a shelf of adapters before any model runs: `ShelfReport`.

From their weights alone: sizes, ranks, spectra, and who resembles whom.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from expertmix.experts.overlap import Overlap, Pair
from expertmix.experts.ranks import Ranks, profile
from expertmix.experts.shelf import Shelf
from expertmix.report import words
from expertmix.report.frame import Frame, write_page

_LEAD = (
    "A shelf holds adapters of one base model: small changes of its weights, each learned from "
    "other text. This page shows, from the weights alone, how much each adapter changes, in how "
    "many directions, and which adapters resemble each other. What a router can tell apart, it "
    "must find here."
)
_MOST = 100  # adapters in a map


@dataclass(frozen=True, eq=False)
class ShelfReport:
    """One page about one shelf.

    Attributes:
        title: Heading of the page.
        bases: The base models that the adapters name; one, as a rule.
        ranks: Sizes and ranks.
        overlap: Who resembles whom.
        profile: (E, r) how fast singular values fall.
        duplicates: Pairs that do nearly the same.
        threshold: The cosine above which they do.
    """

    title: str
    bases: tuple[str, ...]
    ranks: Ranks
    overlap: Overlap
    profile: Tensor
    duplicates: tuple[Pair, ...]
    threshold: float

    @classmethod
    def of(
        cls,
        shelf: Shelf,
        overlap: Overlap,
        *,
        title: str = "What is on the shelf?",
        threshold: float = 0.99,
    ) -> ShelfReport:
        """Measure a shelf.

        Args:
            shelf: The adapters.
            overlap: Of all its adapters.
            title: Heading of the page.
            threshold: Cosine of updates above which two adapters are near-duplicates.
        """
        bases = tuple(dict.fromkeys(adapter.base for adapter in shelf if adapter.base))
        pairs = overlap.duplicates(threshold)
        return cls(title, bases, Ranks.of(shelf), overlap, profile(shelf), pairs, threshold)

    @property
    def names(self) -> tuple[str, ...]:
        """All adapters."""
        return self.ranks.names

    @property
    def shown(self) -> tuple[int, ...]:
        """Numbers of the adapters in the maps: of very many, those that resemble another most."""
        if len(self.names) <= _MOST:
            return tuple(range(len(self.names)))
        others_EE = self.overlap.updates.clone().nan_to_num(-1).fill_diagonal_(-1)
        return tuple(sorted(others_EE.amax(1).topk(_MOST).indices.tolist()))

    @property
    def closest(self) -> Pair | None:
        """The two adapters whose updates are most alike; None where no two share a module."""
        cosines_EE = self.overlap.updates.nan_to_num(-2).tril(-1)
        cosines_EE += torch.full_like(cosines_EE, -3).triu()
        best = int(cosines_EE.argmax())
        second, first = divmod(best, len(self.names))
        return self.overlap.pair(first, second) if cosines_EE[second, first] >= -1 else None

    def html(self) -> str:
        """The whole page, with everything that it needs inside."""
        from expertmix.report.sections import (
            shelf_overlap,
            shelf_ranks,
            shelf_spectra,
            shelf_table,
        )

        sections = [
            *shelf_table.sections(self),
            *shelf_overlap.sections(self),
            shelf_spectra.section(self),
            shelf_ranks.section(self),
        ]
        return Frame(
            title=self.title,
            subtitle=f"adapters of {words.listed(self.bases)}" if self.bases else "adapters",
            lead=_LEAD,
            intro="",
            tiles=self._tiles(),
            sections=[section for section in sections if section is not None],
        ).html()

    def save(self, path: str | Path) -> Path:
        """Write the page.

        Raises:
            OutputError: The file cannot be written; nothing is left half-written.
        """
        return write_page(self.html(), path)

    def _tiles(self) -> list[tuple[str, str]]:
        present = self.ranks.rank[self.ranks.rank > 0]
        effective = self.ranks.effective.nanmean()
        return [
            (words.count(len(self.names)), "adapters"),
            (words.count(len(self.ranks.modules)), "adapted modules"),
            (words.span(present.tolist()) if len(present) else words.DASH, "directions a module"),
            (words.decimal(float(effective), 1), "of them in effective use"),
            (words.count(len(self.duplicates)), "near-duplicates"),
        ]
