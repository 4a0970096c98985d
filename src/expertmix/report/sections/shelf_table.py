"""All adapters as a table, and those that do nearly the same."""

from __future__ import annotations

from expertmix.report.section import Section
from expertmix.report.sections.extra import table_section
from expertmix.report.shelf_report import ShelfReport
from expertmix.report.shelf_tables import adapters_table, duplicates_table


def sections(report: ShelfReport) -> list[Section]:
    """One section, or two where there are near-duplicates."""
    every = table_section(adapters_table(report.ranks, report.overlap), "adapters")
    if not report.duplicates:
        return [every]
    same = duplicates_table(report.duplicates, report.threshold)
    return [every, table_section(same, "duplicates")]
