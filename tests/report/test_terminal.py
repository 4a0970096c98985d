"""Laws of the tables in the terminal."""

from __future__ import annotations

import pytest
from rich.console import Console
from rich.table import Table as RichTable

from expertmix.attribute import usage
from expertmix.report import Effect, data_table, effects_table, sites_table, usage_table

from . import world


def printed(table: RichTable, width: int = 200) -> str:
    console = Console(width=width, no_color=True, record=True, file=None, quiet=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_usage() -> None:
    """A row per text and one for all, a column per expert; a trace and its usage print alike."""
    trace = world.make_trace(world.make_infos(4, 3, 2, ("ann", "bob", "cat")))
    table = usage_table(trace)
    assert table.row_count == len(world.NAMES) + 1
    assert len(table.columns) == 4
    assert printed(table) == printed(usage_table(usage(trace)))
    assert "over 4 layers" in printed(table)


@pytest.mark.parametrize(
    "trace", [world.make_trace(world.make_infos(3, 64, 4)), world.named_trace(4)]
)
def test_usage_fits_a_terminal(trace) -> None:
    """Experts that do not fit into 80 columns are a ranking of three; no name is cut."""
    table = usage_table(trace, ["python"])
    assert [str(column.header) for column in table.columns] == ["text", "first", "second", "third"]
    assert table.row_count == 2
    assert "…" not in printed(table, 80)


def test_sites() -> None:
    """A row per site."""
    assert sites_table(world.named_trace(4)).row_count == 4


def test_effects() -> None:
    """A row per intervention, a column per text; square brackets are text, not markup."""
    effects = [Effect("mask [red]", "[bold]", 1.0, 1.5), Effect("mask b", "x", 1.0, 0.5)]
    shown = printed(effects_table(effects))
    assert "mask [red]" in shown
    assert "[bold]" in shown
    assert "+0.50" in shown
    assert effects_table([]).row_count == 0


def test_data() -> None:
    """A caller's table has all its rows and columns."""
    (data,) = world.make_tables()
    table = data_table(data)
    assert table.row_count == len(data.rows)
    assert "2.350" in printed(table)
