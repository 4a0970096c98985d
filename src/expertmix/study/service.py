"""Who serves which text: a short table of the experts that are called first.

It says who is called, not who is needed; `removal` measures that.
"""

from __future__ import annotations

from expertmix.attribute import Tally, Usage, pool
from expertmix.report import words
from expertmix.report.table import Cell, Table


def service_table(usage: Usage) -> Table:
    """For each label the two experts that most tokens chose first, pooled over all sites.

    Args:
        usage: Of a model whose experts mean the same at every site.
    """
    experts = usage.sites[0].info.experts
    return Table(
        title="Who is called: first choices of tokens over all layers",
        columns=("domain", "called most", "share", "then", "share", "own expert"),
        rows=tuple(_row(label, experts, pool(usage.sites, label)) for label in usage.labels),
        headline=_headline(usage, experts),
        note="The share of tokens that gave this expert their largest weight.",
    )


def _row(label: str, experts: tuple[str, ...], tally: Tally) -> tuple[Cell, ...]:
    shares = tally.first_choice
    best, second = shares.topk(2).indices.tolist()
    own = float(shares[experts.index(label)]) if label in experts else None
    return (
        label,
        experts[best],
        words.percent(float(shares[best])),
        experts[second],
        words.percent(float(shares[second])),
        None if own is None else words.percent(own),
    )


def _headline(usage: Usage, experts: tuple[str, ...]) -> str:
    served = sum(
        experts[int(pool(usage.sites, label).first_choice.argmax())] == label
        for label in usage.labels
    )
    return (
        f"{served} of {len(usage.labels)} kinds of text go first to the expert of their own name."
    )
