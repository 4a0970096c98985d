"""`expertmix demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from expertmix.cli.screen import Screen


def demo(
    ctx: typer.Context,
    out: Annotated[Path, typer.Option(help="Results folder; its files are replaced.")] = Path(
        "expertmix-demo"
    ),
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer, shorter texts: a smoke test.")
    ] = False,
) -> None:
    """Run the whole story on a real model that comes along; no hub, minutes.

    Eight kinds of text go through a mixture of eight trained experts and their
    base: who is called, what the mixture gains, what is lost without each one.
    """
    from expertmix.report.terminal import data_table
    from expertmix.study.demo import run_demo

    screen: Screen = ctx.obj
    with screen.progress() as progress:
        done = run_demo(out, quick, progress)
    screen.emit(done.figures)
    screen.show(data_table(done.service), done.service.headline)
    screen.show("Called often does not mean needed. What counts is the loss:\n")
    for table in done.tables:
        screen.show(data_table(table), table.headline + "\n")
    if quick:
        screen.show("Quick run: too little text to read numbers from. Run it without --quick.\n")
    screen.show(_time(done.figures["seconds"]), "Where to look next:", _next_steps(out))


def _time(seconds: dict[str, float]) -> str:
    setup = seconds["setup"]
    return f"{sum(seconds.values()) - setup:.0f} s, after {setup:.0f} s of set-up"


def _next_steps(out: Path) -> str:
    steps = {
        out / "report.html": "the pictures, and the expert of every token: open it in a browser",
        out / "results.json": "all numbers",
        out / "trace.parquet": "every decision: em.Trace.load, pandas, polars and DuckDB read it",
        "expertmix models default-moe": "the sites and experts of this model",
        "expertmix trace default-moe --prompts FILE --out DIR": "the same for your own text",
    }
    return "\n".join(f"  {what}\n    {why}" for what, why in steps.items())
