"""`expertmix spectra`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from expertmix.cli.screen import Screen

if TYPE_CHECKING:
    from expertmix.study.spectra_job import SpectraResult

_Library = Annotated[
    str,
    typer.Argument(
        help="Folder of adapters, one adapter, a hub id, or the word default.",
        metavar="LIBRARY",
        show_default=False,
    ),
]
_Out = Annotated[
    Path | None, typer.Option(help="Results folder; its files are replaced.", show_default=False)
]
_Duplicates = Annotated[
    float, typer.Option(help="Cosine above which two adapters do the same.", min=0.0, max=1.0)
]
_Cache = Annotated[
    bool, typer.Option("--cache/--no-cache", help="Keep spectra in LIBRARY/.expertmix.")
]
_Prune = Annotated[
    bool, typer.Option("--prune", help="Delete kept spectra of adapters that are gone.")
]


def spectra(
    ctx: typer.Context,
    library: _Library,
    out: _Out = None,
    duplicates: _Duplicates = 0.99,
    cache: _Cache = True,
    prune: _Prune = False,
) -> None:
    """Look at a library of adapters: size, rank, overlap and near-duplicates.

    From the weights alone; no model is read. With --out, writes results.json
    and report.html.
    """
    from expertmix.study.spectra_job import SpectraJob, run_spectra

    screen: Screen = ctx.obj
    job = SpectraJob(library=library, out=out, duplicates=duplicates, cache=cache, prune=prune)
    with screen.progress() as progress:
        done = run_spectra(job, progress)
    _show(screen, done)


def _show(screen: Screen, done: SpectraResult) -> None:
    from expertmix.report import words
    from expertmix.report.terminal import data_table

    screen.emit(done.figures)
    screen.show(*(data_table(table) for table in done.tables))
    kept, adapters = done.figures["cache"], len(done.figures["adapters"])
    if kept["wanted"] and kept["kept"] < adapters:
        left = words.counted(adapters - kept["kept"], "adapter")
        screen.say(f"spectra of {left} could not be kept on the disk")
    if kept["pruned"]:
        screen.show(f"deleted the spectra of {words.counted(kept['pruned'], 'adapter')} not here")
    if done.folder is not None:
        for name in done.figures["files"]:
            screen.show(f"wrote {done.folder / name}")
