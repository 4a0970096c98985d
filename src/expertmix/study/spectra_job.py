"""Look at a library of adapters by its weights alone: `SpectraJob`, and its results folder.

Spectra are kept beside the library, so that whoever composes it later need not compute them again.
The folder holds `results.json` and `report.html`. No model is read.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expertmix.core.progress import Progress, quiet
from expertmix.errors import ConfigError
from expertmix.experts.overlap import Overlap, Pair
from expertmix.experts.peft_folder import CONFIG_FILE, Source, find_adapters
from expertmix.experts.ranks import Ranks
from expertmix.experts.shelf import Cache, Shelf, cache_of
from expertmix.models.default import ASSETS, cache_dir
from expertmix.report.shelf_report import ShelfReport
from expertmix.report.shelf_tables import adapters_table, duplicates_table
from expertmix.report.table import Table
from expertmix.study import figures
from expertmix.study.names import DEFAULT
from expertmix.study.outputs import results, write_json

_MOST_NUMBERS = 200_000  # of one kind in results.json; larger libraries get the summary only


@dataclass(frozen=True, slots=True, kw_only=True)
class SpectraJob:
    """What to look at.

    Attributes:
        library: A folder of adapters, one adapter, a hub id, or `default` for the shipped ones.
        out: Results folder; None writes none.
        duplicates: Cosine of updates above which two adapters are near-duplicates, in 0..1.
        cache: Keep spectra on the disk.
        prune: Delete kept spectra of adapters that are gone from this library.

    Raises:
        ConfigError: The threshold is out of range, or pruning is not possible.
    """

    library: str
    out: Path | None = None
    duplicates: float = 0.99
    cache: bool = True
    prune: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.duplicates <= 1:
            raise ConfigError(f"duplicates must be a cosine in 0..1: {self.duplicates:g}")
        if self.prune and not self.cache:
            raise ConfigError("prune deletes kept spectra: it makes no sense without a cache")
        if self.prune and (Path(self.library) / CONFIG_FILE).is_file():
            raise ConfigError(
                f"{self.library} is one adapter: beside it lie the spectra of its neighbors, which "
                f"prune would delete. Name the folder of the whole library."
            )


@dataclass(frozen=True, eq=False, slots=True)
class SpectraResult:
    """What a job gave.

    Attributes:
        folder: Where its files are, or None.
        figures: The content of results.json.
        tables: For the terminal.
    """

    folder: Path | None
    figures: dict[str, Any]
    tables: tuple[Table, ...]


def run_spectra(job: SpectraJob, progress: Progress = quiet) -> SpectraResult:
    """Do the job; in `out` nothing is written unless all of it succeeds.

    Raises:
        CheckpointError: No adapter there, or one that is refused.
        OutputError: The results folder, or with `prune` the cache, cannot be written.
    """
    if job.out is None:
        return _run(job, None, progress)
    with results(job.out) as folder:
        return _run(job, folder, progress)


def _run(job: SpectraJob, folder: Path | None, progress: Progress) -> SpectraResult:
    start = time.perf_counter()
    cache = _cache(job)
    sources = find_adapters(ASSETS / "experts" if job.library == DEFAULT else job.library)
    shelf = Shelf.load(sources, cache=cache, progress=progress)
    loaded = time.perf_counter() - start
    kept = _kept(sources, shelf, cache) | {"pruned": _prune(sources, shelf, cache, job.prune)}
    page = ShelfReport.of(
        shelf, Overlap.of(shelf, progress=progress), threshold=job.duplicates
    )  # fmt: skip
    seconds = {"loading": loaded, "total": time.perf_counter() - start}
    content = _figures(job, shelf, page, kept, seconds)
    if folder is not None:
        progress("writing the report", 0, 0)
        page.save(folder / "report.html")
        write_json(folder / "results.json", content)
    return SpectraResult(job.out, content, _tables(page))


def _cache(job: SpectraJob) -> Cache:
    """Never inside the installed package."""
    if job.cache and job.library == DEFAULT:
        return cache_dir() / "spectra"
    return job.cache


def _kept(sources: Sequence[Source], shelf: Shelf, cache: Cache) -> dict[str, Any]:
    """How many adapters have their spectra on the disk now."""
    pairs = [(cache_of(source, cache), one) for source, one in zip(sources, shelf, strict=True)]
    found = [place.path(one.digest).is_file() for place, one in pairs if place is not None]
    return {"wanted": bool(cache), "kept": sum(found)}


def _prune(sources: Sequence[Source], shelf: Shelf, cache: Cache, wanted: bool) -> int:
    if not wanted:
        return 0
    places = {place for source in sources if (place := cache_of(source, cache)) is not None}
    return sum(place.prune(one.digest for one in shelf) for place in places)


def _tables(page: ShelfReport) -> tuple[Table, ...]:
    every = adapters_table(page.ranks, page.overlap)
    if not page.duplicates:
        return (every,)
    return every, duplicates_table(page.duplicates, page.threshold)


def _figures(
    job: SpectraJob,
    shelf: Shelf,
    page: ShelfReport,
    kept: dict[str, Any],
    seconds: dict[str, float],
) -> dict[str, Any]:
    return {
        "command": "spectra",
        "library": job.library,
        "adapters": [_adapter(page, shelf, number) for number in range(len(shelf))],
        "modules": _modules(shelf, page.ranks),
        "overlap": _overlap(page.overlap),
        "threshold": job.duplicates,
        "duplicates": [_pair(pair) for pair in page.duplicates],
        "cache": kept,
        "files": [] if job.out is None else ["results.json", "report.html"],
        "seconds": figures.named(seconds),
        "machine": figures.machine(),
        "versions": figures.versions(),
    }


def _adapter(page: ShelfReport, shelf: Shelf, number: int) -> dict[str, Any]:
    ranks, nearest = page.ranks, page.overlap.nearest(number)
    return {
        "name": ranks.names[number],
        "base": shelf.adapters[number].base,
        "digest": shelf.adapters[number].digest,
        "modules": int((ranks.rank[number] > 0).sum()),
        "rank": max(ranks.rank[number].tolist(), default=0),
        "size": figures.number(float(ranks.total_size[number])),
        "effective_rank": figures.number(float(ranks.mean_effective[number])),
        "stable_rank": figures.number(float(ranks.stable[number].nanmean())),
        "nearest": None if nearest is None else _pair(page.overlap.pair(number, nearest)),
    }


def _modules(shelf: Shelf, ranks: Ranks) -> dict[str, Any] | None:
    """Per adapter and module its spectrum and what follows from it."""
    if int(ranks.rank.sum()) > _MOST_NUMBERS:
        return None
    tables = {"size": ranks.size, "effective_rank": ranks.effective, "stable_rank": ranks.stable}
    rows = {name: table.tolist() for name, table in tables.items()}
    return {
        adapter.name: {
            module: {
                "singular": figures.numbers(adapter.modules[module].singular.tolist(), 6),
                **{name: figures.number(row[number][place]) for name, row in rows.items()},
            }
            for place, module in enumerate(ranks.modules)
            if module in adapter.modules and adapter.modules[module].rank
        }
        for number, adapter in enumerate(shelf)
    }


def _overlap(overlap: Overlap) -> dict[str, Any] | None:
    """Adapters by adapters, in the order of `adapters`."""
    if overlap.reads.numel() > _MOST_NUMBERS:
        return None
    tables = {"reads": overlap.reads, "updates": overlap.updates, "chance": overlap.chance}
    return {
        name: [figures.numbers(row) for row in table.tolist()] for name, table in tables.items()
    }


def _pair(pair: Pair) -> dict[str, Any]:
    return {
        "first": pair.first,
        "second": pair.second,
        "updates": figures.number(pair.updates),
        "reads": figures.number(pair.reads),
    }
