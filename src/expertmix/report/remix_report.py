"""What is reported of re-mixed routing: `RemixReport`, a page of methods, controls and items.

The base, methods and their controls answered the same items; the page shows who was right, who
flipped, how routing moved, and what it cost. Prompts and options are on it only if they are given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from expertmix.errors import ConfigError
from expertmix.report import remix_words, words
from expertmix.report.frame import Frame, write_page
from expertmix.report.markup import Html, join, tag
from expertmix.report.remix_data import RemixItem, RemixLine

_LEAD = (
    "A router decides which experts of a model work on a text. Here its choice was re-mixed for "
    "each item, in a few late layers at the end of the prompt, toward what worked for similar "
    "items whose answers are known; no weight of the model was changed. This page shows whether "
    "that helped, against the routing as it is and against controls that should not help."
)
_MOST_SAMPLES = 12
_MOST_METHODS = 6  # whose samples are shown one by one

Text = tuple[str, Sequence[str]]
"""A prompt and its options."""


@dataclass(frozen=True, eq=False)
class RemixReport:
    """One page about one run.

    Attributes:
        title: Heading of the page.
        model: What was run.
        task: On which items.
        lines: A line per routing; the base's first.
        items: What became of each item under each routing; none of some routing is no error.
        sites: Names of the L critical sites, in order.
        experts: Names of the E experts; of unnamed ones, their numbers.
        said: What the caller found the numbers to show, sentence by sentence.
        facts: What was run, by name.
        texts: By number of an item its prompt and options; None keeps all text off the page.
        most: Samples that are shown one by one, per method.
    """

    title: str
    model: str
    task: str
    lines: Sequence[RemixLine]
    items: Sequence[RemixItem]
    sites: Sequence[str] = ()
    experts: Sequence[str] = ()
    said: Sequence[str] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    texts: Mapping[int, Text] | None = None
    most: int = _MOST_SAMPLES

    def __post_init__(self) -> None:
        if not self.lines or self.lines[0].kind != "base":
            raise ConfigError("a page about re-mixed routing needs the base's line, and first")

    @property
    def base(self) -> RemixLine:
        """The routing as it is."""
        return self.lines[0]

    @property
    def free(self) -> bool:
        """There are no options to choose from: only losses."""
        return math.isnan(self.base.accuracy.value)

    @cached_property
    def ordered(self) -> tuple[RemixLine, ...]:
        """Each method with its controls right below it; then controls of all, then bounds."""
        found = [self.base]
        for method in [line for line in self.lines if line.competes]:
            found += [method, *(line for line in self.lines if line.of == method.method)]
        rest = [line for line in self.lines if not any(line is one for one in found)]
        order = {"control": 0, "bound": 1}
        return (*found, *sorted(rest, key=lambda line: order.get(line.kind, 2)))

    @cached_property
    def by_method(self) -> Mapping[str, Sequence[RemixItem]]:
        """Items of each routing, in order of their numbers."""
        found: dict[str, list[RemixItem]] = {line.method: [] for line in self.ordered}
        for item in self.items:
            found.setdefault(item.method, []).append(item)
        return {name: sorted(own, key=lambda one: one.item) for name, own in found.items()}

    @property
    def studied(self) -> tuple[RemixLine, ...]:
        """Routings whose items are shown: methods; without any, whatever else was run."""
        others = [line for line in self.ordered if line.kind != "base"]
        return tuple([line for line in others if line.competes] or others)[:_MOST_METHODS]

    def chosen(self, method: str) -> tuple[RemixItem, ...]:
        """Items of a method that are shown: flipped ones, both ways in turn, then the most changed.

        If any was left alone, one of those is among them.

        Args:
            method: Its name.
        """
        own = sorted(self.by_method.get(method, ()), key=lambda one: -_size(one.change))
        gained, lost = ([one for one in own if one.flip == way] for way in ("gained", "lost"))
        pairs = max(len(gained), len(lost))
        turns = [part[n] for n in range(pairs) for part in (gained, lost) if n < len(part)]
        found = [*turns, *(one for one in own if not one.flip)]
        shown, rest = found[: self.most], found[self.most :]
        alone = next((one for one in rest if one.alone), None)
        if alone is not None and self.most > 1 and not any(one.alone for one in shown):
            shown[-1] = alone
        return tuple(shown)

    def html(self) -> str:
        """The whole page, with everything that it needs inside."""
        from expertmix.report.sections import (
            remix_accuracy,
            remix_cost,
            remix_flips,
            remix_pathway,
            remix_run,
            remix_samples,
            remix_table,
        )

        sections = [
            remix_table.section(self),
            remix_accuracy.section(self),
            remix_flips.section(self),
            remix_pathway.section(self),
            remix_samples.section(self),
            remix_cost.section(self),
            remix_run.section(self),
        ]
        return Frame(
            title=self.title,
            subtitle=self._subtitle(),
            lead=_LEAD,
            intro="",
            tiles=self._tiles(),
            sections=[section for section in sections if section is not None],
        ).html()

    def sample_html(self, item: int, method: str | None = None) -> str:
        """A page about a single item.

        Args:
            item: Its number.
            method: Under this routing; under the first method by default.

        Raises:
            ConfigError: No such item, or not under that routing.
        """
        from expertmix.report.sections import remix_samples

        name = method or self.studied[0].method
        found = [one for one in self.by_method.get(name, ()) if one.item == item]
        if not found:
            raise ConfigError(f"there is no item {item} under {name!r}")
        return Frame(
            title=found[0].name,
            subtitle=self._subtitle(),
            lead=f"What {name} made of one item: whom it learned from, and where that led.",
            intro="",
            tiles=[],
            sections=[remix_samples.single(self, found[0])],
        ).html()

    def save(self, path: str | Path) -> Path:
        """Write the page.

        Raises:
            OutputError: The file cannot be written; nothing is left half-written.
        """
        return write_page(self.html(), path)

    def _subtitle(self) -> Html:
        return join([tag("span", {"class": "model"}, self.model), f" · {self.task}"])

    def _tiles(self) -> list[tuple[str, str]]:
        found = [(words.count(self.base.items), "item" if self.base.items == 1 else "items")]
        for line in (self.base, *self.studied[:1]):
            shown = (
                (words.decimal(line.loss, 3), "loss in nats")
                if self.free
                else (remix_words.share(line.accuracy.value), "right")
            )
            found.append((shown[0], f"{shown[1]}, {words.cut(line.method, 24)}"))
        for line in self.studied[:1]:
            if not self.free:
                found.append((f"{line.gained} / {line.lost}", "gained / lost"))
            found.append((remix_words.times(line.relative), "of the base's time"))
        return found


def _size(change: float) -> float:
    return -1.0 if math.isnan(change) else abs(change)
