"""`expertmix report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from expertmix.cli.screen import Screen


def report(
    ctx: typer.Context,
    trace: Annotated[Path, typer.Argument(help="A trace.parquet.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "Who does the work?",
) -> None:
    """Draw a trace as one offline page: load, balance, flow, tokens."""
    from expertmix.core.trace import Trace
    from expertmix.report.chain_table import chain_tables
    from expertmix.report.report import Report
    from expertmix.report.terminal import data_table, usage_table

    screen: Screen = ctx.obj
    with screen.progress() as progress:
        progress("reading the trace", 0, 0)
        page = Report.of(Trace.load(trace), title=title)
        page.save(out)
    screen.emit({"command": "report", "files": [out.name], "tokens": page.usage.tokens})
    screen.show(*(data_table(table) for table in chain_tables(page.chains)))
    screen.show(usage_table(page.usage), f"wrote {out}")
