"""Who resembles whom: two heat maps of adapters by adapters, of what they read and what they do."""

from __future__ import annotations

import math

from torch import Tensor

from expertmix.report import words
from expertmix.report.plots import MANY, Plot, heat_map
from expertmix.report.section import Section, chart
from expertmix.report.shelf_report import ShelfReport

_COLORS = {"updates": "cosine", "reads": "overlap"}
_PALEST = 0.05  # a map whose largest overlap is smaller than this stays pale


def sections(report: ShelfReport) -> list[Section]:
    """One section each; none for a single adapter, or where no two share a module."""
    return [] if report.closest is None else [_updates(report), _reads(report)]


def _updates(report: ShelfReport) -> Section:
    plot = _map(report, report.overlap.updates, "updates", "cosine of their updates %{z:.3f}")
    return Section(
        key="updates",
        title="Which adapters do the same?",
        headline=updates_headline(report),
        reading=(
            "The darker a cell, the more two adapters change the model in the same way. Adapters "
            "of different skills stay near zero; a pair near one does the same work twice. A "
            "negative cosine, two that undo each other, stays white."
        ),
        body=chart(
            plot, f"Cosine of their updates, mean over the modules they share.{_cut(report)}"
        ),
        plots=(plot,),
    )


def _reads(report: ShelfReport) -> Section:
    plot = _map(report, report.overlap.reads, "reads", "spaces that they read overlap by %{z:.3f}")
    chance = words.percent(_median(report, report.overlap.chance))
    return Section(
        key="reads",
        title="Which adapters read the same?",
        headline=reads_headline(report),
        reading=(
            "An adapter looks at its input along a few directions only. The darker a cell, the "
            "more of these two adapters share. A router that decides by what adapters read cannot "
            "tell such a pair apart, even where they do quite different things with it. Adapters "
            "that were started from the same random numbers read alike for that reason alone."
        ),
        body=chart(
            plot,
            f"Mean squared cosine of the principal angles between both spaces, mean over the "
            f"modules that they share. Random spaces of this size would overlap by {chance}."
            f"{_cut(report)}",
        ),
        plots=(plot,),
    )


def updates_headline(report: ShelfReport) -> str:
    """The pair that is most alike."""
    pair = report.closest
    assert pair is not None
    return (
        f"{words.named(pair.first)} and {words.named(pair.second)} are most alike: their updates "
        f"have a cosine of {words.decimal(pair.updates)}."
    )


def reads_headline(report: ShelfReport) -> str:
    """What a pair shares as a rule, beside chance."""
    usual, chance = (
        _median(report, table) for table in (report.overlap.reads, report.overlap.chance)
    )
    times = words.decimal(usual / chance, 0 if usual / chance >= 10 else 1)
    alike = _alike(report)
    groups = (
        f" {len(alike)} of {len(report.names)} adapters share more than half with another: "
        f"{words.listed([words.named(name) for name in alike])}."
        if alike
        else ""
    )
    return (
        f"Half of all pairs share at least {words.percent(usual)} of what they read, {times} times "
        f"what chance gives.{groups}"
    )


def _alike(report: ShelfReport) -> list[str]:
    """Adapters that share more than half of what they read with another."""
    others_EE = report.overlap.reads.nan_to_num(0).fill_diagonal_(0)
    above_E = (others_EE > 0.5).any(1).tolist()
    return [name for name, above in zip(report.names, above_E, strict=True) if above]


def _median(report: ShelfReport, table: Tensor) -> float:
    """Over pairs that share a module."""
    pairs = (report.overlap.common > 0).triu(1)
    return float(table[pairs].median()) if pairs.any() else math.nan


def _map(report: ShelfReport, table: Tensor, key: str, hover: str) -> Plot:
    shown = list(report.shown)
    part = table[shown][:, shown].clone().fill_diagonal_(math.nan)
    top = max(_PALEST, float(part.nan_to_num(0).max()))
    names = [report.names[number] for number in shown]
    trace, layout = heat_map(
        [words.rounded(row) for row in part.tolist()],
        columns=names,
        rows=names,
        column_title="adapter",
        hover=f"%{{y}} and %{{x}}: {hover}",
        top=top,
    )
    title = f"Heat map of adapters by adapters: {key}"
    wide, scale = len(names) > MANY, (_COLORS[key], top)
    return Plot(f"overlap-{key}", title, [trace], layout, color_key=scale, wide=wide)


def _cut(report: ShelfReport) -> str:
    left = len(report.names) - len(report.shown)
    if not left:
        return ""
    return f" Shown are the {len(report.shown)} adapters that resemble another one most."
