"""How the command line fails, and where global options may stand.

Every `ExpertmixError` becomes one line on stderr and exit code 2. Global flags may stand anywhere:
`expertmix trace … --json` is `expertmix --json trace …`.
"""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from expertmix.cli.screen import Screen
from expertmix.errors import ExpertmixError

_FLAGS = frozenset({"--json", "--debug"})
_BAD_INPUT = 2
_INTERRUPTED = 130  # 128 + SIGINT, as shells have it


class Group(TyperGroup):
    """All commands."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Move global flags to the front."""
        end = args.index("--") if "--" in args else len(args)
        flags = [arg for arg in args[:end] if arg in _FLAGS]
        rest = [arg for arg in args[:end] if arg not in _FLAGS]
        return super().parse_args(ctx, [*flags, *rest, *args[end:]])

    def invoke(self, ctx: Any) -> Any:
        """Run a command; end well."""
        try:
            return super().invoke(ctx)
        except ExpertmixError as problem:
            _screen(ctx).error(problem)
            raise typer.Exit(_BAD_INPUT) from None
        except KeyboardInterrupt:
            _screen(ctx).say("interrupted: nothing half-written was kept")
            raise typer.Exit(_INTERRUPTED) from None


def _screen(ctx: Any) -> Screen:
    return ctx.obj if isinstance(ctx.obj, Screen) else Screen()
