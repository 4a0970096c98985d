"""The program `expertmix`: global options and the list of commands."""

from __future__ import annotations

from typing import Annotated

import typer

from expertmix.cli.compose import compose
from expertmix.cli.convert import convert
from expertmix.cli.demo import demo
from expertmix.cli.doctor import doctor
from expertmix.cli.group import Group
from expertmix.cli.models import models
from expertmix.cli.optimize import optimize
from expertmix.cli.report import report
from expertmix.cli.screen import Screen
from expertmix.cli.spectra import spectra
from expertmix.cli.trace import trace
from expertmix.cli.train import train

app = typer.Typer(
    name="expertmix",
    cls=Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 doctor found a problem, 2 bad input, 130 interrupted.",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from expertmix import __version__

        typer.echo(f"expertmix {__version__}")
        raise typer.Exit


@app.callback()
def options(
    ctx: typer.Context,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print results as JSON, and nothing else, on stdout.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of errors.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    """See, compose, re-mix and explain how experts are routed inside language models."""
    ctx.obj = Screen(as_json=as_json, debug=debug)


for command in (
    demo, trace, compose, optimize, spectra, convert, train, report, models, doctor,
):  # fmt: skip
    app.command()(command)
