"""What the user sees: results on stdout, everything else on stderr.

With `--json` stdout holds one JSON document and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from expertmix.errors import ExpertmixError
from expertmix.report import words

Report = Callable[[str, int, int], None]
"""(stage, done, total); a total of 0 means that it is not known."""


class Screen:
    """Where a command speaks.

    Args:
        as_json: Results as JSON.
        debug: Errors with their traceback.
    """

    def __init__(self, *, as_json: bool = False, debug: bool = False) -> None:
        self.as_json = as_json
        self._debug = debug
        self._out = Console()
        self._err = Console(stderr=True)

    def show(self, *parts: RenderableType) -> None:
        """Tables and text for people; nothing with `--json`."""
        if not self.as_json:
            for part in parts:
                line = isinstance(part, str)
                shown = words.printable(part) if isinstance(part, str) else part
                self._out.print(shown, soft_wrap=line, highlight=False, markup=False)

    def emit(self, figures: Mapping[str, Any]) -> None:
        """The result for programs; nothing without `--json`."""
        if self.as_json:
            from expertmix.study.outputs import as_json

            typer.echo(as_json(figures))

    def say(self, text: str) -> None:
        """A line on stderr."""
        self._err.print(words.printable(text), markup=False, highlight=False, soft_wrap=True)

    def error(self, problem: ExpertmixError) -> None:
        """One clean line, in red; the traceback where it is wanted."""
        if self._debug:
            self._err.print_exception()
        line = words.printable(f"error: {problem}")
        self._err.print(line, style="red", markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def progress(self) -> Iterator[Report]:
        """Bars on stderr while work goes on; none without a terminal, none with `--json`."""
        quiet_libraries()
        if self.as_json or not self._err.is_terminal:
            yield _ignore
            return
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self._err, transient=True) as bars:
            yield _Bars(bars).update


class _Bars:
    """One bar per stage, in order of appearance."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}
        self._open: TaskID | None = None

    def update(self, stage: str, done: int, total: int) -> None:
        """Move the bar of a stage; a stage of unknown length ends when the next one speaks."""
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total or None)
        task = self._tasks[stage]
        if self._open not in (None, task):
            self._bars.update(self._open, total=1, completed=1)
        self._open = None if total else task
        self._bars.update(task, completed=done, total=total or None)


def quiet_libraries() -> None:
    """Turn off bars and chatter of transformers and the hub: the command speaks for itself."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    transformers: Any = logging
    transformers.set_verbosity_error()
    transformers.disable_progress_bar()
    hub: Any = hub_logging
    hub.set_verbosity_error()


def _ignore(stage: str, done: int, total: int) -> None:
    """No terminal, no bars."""
