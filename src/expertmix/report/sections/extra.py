"""The caller's own tables, a section each."""

from __future__ import annotations

from expertmix.report.report import Report
from expertmix.report.section import CellStyle, Section, grid
from expertmix.report.table import Cell, Table

_LONG = 12  # letters of a cell that need a column as wide as they are


def sections(report: Report) -> list[Section]:
    """One per table."""
    return [table_section(table, f"table-{number}") for number, table in enumerate(report.tables)]


def table_section(table: Table, key: str) -> Section:
    """A table as a section with that anchor."""
    first, *columns = table.columns
    rows = [(table.show(row[0]), _cells(table, row)) for row in table.rows]
    marked = " The best number of each row is set in bold." if table.best else ""
    long = any(len(cell.shown) > _LONG for _, cells in rows for cell in cells)
    return Section(
        key=key,
        title=table.title,
        headline=table.headline,
        reading=f"{table.note}{marked}".strip(),
        body=grid(table.title, first, columns, rows, css="grid loose" if long else "grid"),
        summary=bool(table.headline),
    )


def _cells(table: Table, row: tuple[Cell, ...]) -> list[CellStyle]:
    best = table.best_columns(row)
    return [
        CellStyle(table.show(cell), strong=column in best)
        for column, cell in enumerate(row)
        if column
    ]
