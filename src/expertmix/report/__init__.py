"""How routing is shown: one offline HTML page, and tables for the terminal.

Nothing is imported before it is asked for: neither torch nor plotly.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from expertmix.report.effect import Effect
    from expertmix.report.report import Report
    from expertmix.report.table import Table
    from expertmix.report.terminal import data_table, effects_table, sites_table, usage_table

_HOME = {
    "Report": "report",
    "Effect": "effect",
    "Table": "table",
    "usage_table": "terminal",
    "sites_table": "terminal",
    "effects_table": "terminal",
    "data_table": "terminal",
}

__all__ = [
    "Effect",
    "Report",
    "Table",
    "data_table",
    "effects_table",
    "sites_table",
    "usage_table",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
