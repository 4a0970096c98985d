"""The caller's own tables, a section each."""

from __future__ import annotations

from expertmix.report.report import Report
from expertmix.report.section import CellStyle, Section, grid
from expertmix.report.table import Cell, Table


def sections(report: Report) -> list[Section]:
    """One per table."""
    return [_section(table, number) for number, table in enumerate(report.tables)]


def _section(table: Table, number: int) -> Section:
    first, *columns = table.columns
    rows = [(table.show(row[0]), _cells(table, row)) for row in table.rows]
    marked = " The best number of each row is set in bold." if table.best else ""
    return Section(
        key=f"table-{number}",
        title=table.title,
        headline=table.headline,
        reading=f"{table.note}{marked}".strip(),
        body=grid(table.title, first, columns, rows),
        summary=bool(table.headline),
    )


def _cells(table: Table, row: tuple[Cell, ...]) -> list[CellStyle]:
    best = table.best_columns(row)
    return [
        CellStyle(table.show(cell), strong=column in best)
        for column, cell in enumerate(row)
        if column
    ]
