"""Any numbers that a caller wants on the page: `Table`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from expertmix.errors import ConfigError
from expertmix.report import words

Cell = str | float | int | None


@dataclass(frozen=True, slots=True)
class Table:
    """A table for the report and the terminal.

    Attributes:
        title: Heading.
        columns: Names; the first column names the rows.
        rows: Cells; None shows as a dash.
        note: A sentence that says what one sees and how to read it.
        headline: A sentence that says what the numbers show.
        best: Mark the best number of each row: the `lowest`, the `highest`, or none.
        digits: Decimals of numbers that are not whole.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    headline: str = ""
    best: Literal["lowest", "highest"] | None = None
    digits: int = 3

    def __post_init__(self) -> None:
        for number, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ConfigError(
                    f"table {self.title!r}: row {number} has {len(row)} cells for "
                    f"{len(self.columns)} columns"
                )

    def show(self, cell: Cell) -> str:
        """A cell as text."""
        if cell is None:
            return words.DASH
        if isinstance(cell, float):
            return words.decimal(cell, self.digits)
        return words.count(cell) if isinstance(cell, int) else cell

    def best_columns(self, row: tuple[Cell, ...]) -> frozenset[int]:
        """Columns that hold the best number of a row; more than one where they tie."""
        numbers = {
            column: float(cell)
            for column, cell in enumerate(row)
            if isinstance(cell, int | float) and cell == cell
        }
        if self.best is None or len(numbers) < 2:
            return frozenset()
        best = min(numbers.values()) if self.best == "lowest" else max(numbers.values())
        return frozenset(column for column, number in numbers.items() if number == best)
