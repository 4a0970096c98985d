"""How routing is shown in a terminal: rich tables for the command line."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.table import Table as RichTable
from rich.text import Text

from expertmix.attribute.mass import usage
from expertmix.attribute.tally import SiteUsage, Tally, Usage
from expertmix.core.trace import Trace
from expertmix.report import places, words
from expertmix.report.effect import Effect
from expertmix.report.groups import Group, grouped
from expertmix.report.table import Table

_WIDTH = 80  # of a plain terminal; experts that do not fit are a ranking, not a column each
_RANKS = 3
_LONGEST = 60  # letters of a cell


def usage_table(trace: Trace | Usage, labels: Sequence[str] | None = None) -> RichTable:
    """Which expert is the first choice for which text: label × expert, in percent.

    Experts are pooled over sites where they have names; otherwise the site counts at which the
    texts differ most. Where a column for each does not fit, a row names the three largest.

    Args:
        trace: A trace, or what was counted of one.
        labels: Rows; all labels by default.
    """
    counted = _counted(trace)
    group = max(grouped(counted.sites), key=lambda group: len(group.sites))
    rows: dict[str, str | None] = {label: label for label in labels or counted.labels}
    rows[words.all_text(rows)] = None
    where = _where(counted, group)
    if _width([*rows], group.experts) <= _WIDTH:
        table = _table(f"First choice of tokens, {where}", ["text", *group.experts])
        for name, label in rows.items():
            _add(table, [name, *_shares(group.tally(label))])
        return table
    table = _table(f"First choices of tokens, {where}", ["text", "first", "second", "third"])
    for name, label in rows.items():
        _add(table, [name, *_ranking(group, group.tally(label))])
    return table


def _width(labels: Sequence[str], experts: Sequence[str]) -> int:
    """Columns on the screen: a frame and two blanks around each, and "100 %" at least."""
    return 1 + sum(
        max(map(len, [*column, "100 %"])) + 3 for column in ([*labels], *([e] for e in experts))
    )


def sites_table(trace: Trace | Usage) -> RichTable:
    """Per site: experts, busiest expert, balance, entropy and experts never called."""
    counted = _counted(trace)
    names = places.short_names([site.site for site in counted])
    columns = [places.noun(names), "experts", "busiest", "called by", "balance", "entropy", "dead"]
    table = _table("Sites", columns)
    for site in counted:
        if site.total.tokens:
            _add(table, [names[site.site], *_site_row(site)])
    return table


def effects_table(effects: Iterable[Effect], metric: str | None = None) -> RichTable:
    """Changes of one metric: intervention × label.

    Args:
        effects: As given to a report.
        metric: Which one; the first effect's by default.
    """
    every = list(effects)
    wanted = metric if metric is not None or not every else every[0].metric
    kept = [effect for effect in every if effect.metric == wanted]
    labels = list(dict.fromkeys(effect.label for effect in kept))
    table = _table(f"Change in {wanted}", ["intervention", *labels])
    by_place = {(effect.intervention, effect.label): effect for effect in kept}
    for name in dict.fromkeys(effect.intervention for effect in kept):
        _add(table, [name, *(_change(by_place.get((name, label))) for label in labels)])
    return table


def data_table(data: Table) -> RichTable:
    """A caller's table."""
    table = _table(data.title, data.columns)
    for row in data.rows:
        best = data.best_columns(row)
        _add(
            table,
            [
                Text(_shown(data.show(cell)), style="bold" if column in best else "")
                for column, cell in enumerate(row)
            ],
        )
    return table


def _counted(trace: Trace | Usage) -> Usage:
    return trace if isinstance(trace, Usage) else usage(trace)


def _where(counted: Usage, group: Group) -> str:
    names = places.short_names([site.site for site in counted])
    kind = places.noun(names)
    if len(group.view) > 1:
        return f"over {len(group.view)} {kind}s"
    return f"{kind} {names[group.view[0].site]}"


def _table(title: str, columns: Sequence[str]) -> RichTable:
    table = RichTable(title=Text(title), title_justify="left", header_style="")
    for number, column in enumerate(columns):
        heading = Text(_shown(column), style="bold")
        table.add_column(heading, justify="right" if number else "left", overflow="fold")
    return table


def _add(table: RichTable, cells: Iterable[str | Text]) -> None:
    """A row of text: square brackets in a name are no markup."""
    table.add_row(*(cell if isinstance(cell, Text) else Text(_shown(cell)) for cell in cells))


def _shown(cell: str) -> str:
    """Names of adapters may be anything that a folder can be called."""
    return words.printable(words.cut(cell, _LONGEST))


def _shares(tally: Tally) -> list[Text]:
    shares = tally.first_choice.tolist()
    best = max(shares)
    return [Text(words.percent(share), style="bold" if share == best else "") for share in shares]


def _ranking(group: Group, tally: Tally) -> list[str]:
    top = tally.first_choice.nan_to_num(-1).topk(_RANKS)
    return [
        f"{group.expert(expert).strip('`')}: {words.percent(share)}" if share > 0 else words.DASH
        for share, expert in zip(top.values.tolist(), top.indices.tolist(), strict=True)
    ]


def _site_row(site: SiteUsage) -> list[str]:
    tally = site.total
    busiest = int(tally.calls.argmax())
    return [
        str(site.info.num_experts),
        site.info.expert_name(busiest),
        words.percent(float(tally.frequency[busiest])),
        words.decimal(tally.balance),
        words.decimal(tally.entropy),
        str(len(tally.dead)),
    ]


def _change(effect: Effect | None) -> str:
    return words.DASH if effect is None else words.signed(effect.delta)
