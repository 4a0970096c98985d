"""`expertmix doctor`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer
from rich.table import Table
from rich.text import Text

from expertmix.cli.screen import Screen

if TYPE_CHECKING:
    from expertmix.study.checkup import Check

_STYLES = {"ok": "green", "note": "yellow", "problem": "red"}


def doctor(ctx: typer.Context) -> None:
    """Check Python, packages, cache folder and the default model's parts; exit code 1 if wrong."""
    from dataclasses import asdict

    from expertmix.study.checkup import check_up, worst

    screen: Screen = ctx.obj
    with screen.progress() as progress:
        progress("looking around", 0, 0)
        checks = check_up()
    verdict = worst(checks)
    screen.emit({"verdict": verdict, "checks": [asdict(check) for check in checks]})
    screen.show(_table(checks), f"verdict: {verdict}")
    if verdict == "problem":
        raise typer.Exit(1)


def _table(checks: tuple[Check, ...]) -> Table:
    table = Table("", "", "found", "what to do")
    for check in checks:
        verdict = Text(check.verdict, style=_STYLES[check.verdict])
        table.add_row(Text(check.name), verdict, Text(check.found), Text(check.advice))
    return table
