"""`expertmix models`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from expertmix.cli.screen import Screen


def models(
    ctx: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(help="Hub id, folder, or default-moe: show its sites.", show_default=False),
    ] = None,
) -> None:
    """Show which model families work; with MODEL, its sites and experts."""
    from expertmix.study.catalog import catalog, describe

    screen: Screen = ctx.obj
    if model is None:
        known = catalog()
        screen.emit(known.figures())
        screen.show(
            f"{len(known.tested)} families of transformers pass every test of recording:",
            Text(", ".join(known.tested)),
            _refused(known.refused),
            "Other families with a router and an experts module are found by structure: try them.",
        )
        return
    with screen.progress() as progress:
        found = describe(model, progress)
    screen.emit(found)
    context = f"{found['context']:,} tokens" if found["context"] else "no limit"
    screen.show(
        f"{found['architecture']}: {len(found['sites'])} sites, context {context}",
        *_sites(found["sites"]),
    )


def _refused(reasons: dict[str, str]) -> Table:
    table = Table("experts module", "why it cannot be recorded", title="Refused")
    for name, reason in reasons.items():
        table.add_row(name, Text(reason))
    return table


def _sites(sites: list[dict[str, Any]]) -> Iterator[RenderableType]:
    """A row per site; names of experts once, where all sites share them."""
    names = {tuple(site["names"]) for site in sites}
    table = Table("site", "experts", "per token", *(["names"] if len(names) > 1 else []))
    for site in sites:
        own = [Text(", ".join(site["names"]))] if len(names) > 1 else []
        table.add_row(Text(site["site"]), str(site["experts"]), str(site["top_k"]), *own)
    yield table
    if len(names) == 1 and any(names):
        yield f"experts: {', '.join(names.pop())}"
