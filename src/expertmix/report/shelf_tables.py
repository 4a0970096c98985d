"""A shelf of adapters as tables, for the terminal and the page."""

from __future__ import annotations

from collections.abc import Sequence

from expertmix.experts.overlap import Overlap, Pair
from expertmix.experts.ranks import Ranks
from expertmix.report import words
from expertmix.report.table import Cell, Table


def adapters_table(ranks: Ranks, overlap: Overlap) -> Table:
    """One row per adapter: how large, how many directions, and who is most like it."""
    return Table(
        title="Adapters",
        columns=(
            "adapter", "modules", "rank", "in use", "size", "most like", "updates", "reads",
        ),
        rows=tuple(_row(ranks, overlap, number) for number in range(len(ranks.names))),
        note=(
            "Modules: at how many the adapter does something. Rank: its directions there. "
            "In use: over how many of them its strength is spread (effective rank, mean over "
            "modules). Size: the Frobenius norm of all its updates. Most like: the adapter whose "
            "updates point the same way most; updates is the cosine between both, and reads the "
            "overlap of the spaces that both read."
        ),
        digits=2,
    )  # fmt: skip


def duplicates_table(pairs: Sequence[Pair], threshold: float) -> Table:
    """Pairs that do nearly the same."""
    headline = f"{words.counted(len(pairs), 'pair')} of adapters do nearly the same."
    if len(pairs) == 1:
        first, second = words.named(pairs[0].first), words.named(pairs[0].second)
        headline = f"{first} and {second} do nearly the same."
    return Table(
        title="Near-duplicates",
        columns=("adapter", "does what", "updates", "reads"),
        rows=tuple((pair.first, pair.second, pair.updates, pair.reads) for pair in pairs),
        note=f"Pairs whose updates have a cosine above {threshold:g}: one of both is enough.",
        headline=headline,
        digits=4,
    )


def _row(ranks: Ranks, overlap: Overlap, number: int) -> tuple[Cell, ...]:
    present = ranks.rank[number][ranks.rank[number] > 0].tolist()
    nearest = overlap.nearest(number)
    alike: tuple[Cell, ...] = (None, None, None)
    if nearest is not None:
        pair = overlap.pair(number, nearest)
        alike = (pair.second, pair.updates, pair.reads)
    return (
        ranks.names[number],
        len(present),
        words.span(present) if present else None,
        float(ranks.mean_effective[number]),
        float(ranks.total_size[number]),
        *alike,
    )
