"""What was run: model, items, references, settings of every routing, versions, and words."""

from __future__ import annotations

from collections.abc import Mapping

from expertmix.report import remix_words, words
from expertmix.report.markup import Html, join, tag
from expertmix.report.remix_data import RemixLine
from expertmix.report.remix_report import RemixReport
from expertmix.report.section import Section

_WORDS = {
    "Base": "the model with its router as it is.",
    "Pathway": "the weights over experts that a sample's last prompt tokens get in the critical "
    "layers.",
    "Critical layers": "those whose routing was re-mixed.",
    "Reference": "an item whose answer is known, and which the base gets right.",
    "Neighbor": "a reference that is similar to an item.",
    "Kernel weight": "how much a neighbor counts for an item.",
    "Dense, hard": "while optimizing, many experts are called (dense); the answer is given with as "
    "many as the router calls (hard).",
    "Method, rival": "what was to be tested, and what it is compared with.",
    "Control": "what should not help, if a method helps because similar items teach it something.",
    "Bound": "what needs the right answer; nobody could use it.",
    "Loss": "how badly the right option does against the others, in nats; of a text with one "
    "answer, how badly that is predicted. Lower is better.",
}
_LEFT_OUT = (
    "Questions and options are left out of this page; it names items by their names only. Nothing "
    "on it is fetched from the network, and it can be kept or sent as one file."
)
_WITH_TEXT = (
    "This page holds questions and options of the items that it shows one by one. Nothing on it is "
    "fetched from the network, and it can be kept or sent as one file."
)


def section(report: RemixReport) -> Section:
    """Facts, settings and a glossary."""
    facts = {"Model": report.model, "Task": report.task, **report.facts}
    return Section(
        key="about",
        title="What was run",
        reading=_LEFT_OUT if report.texts is None else _WITH_TEXT,
        body=join(
            [
                _definitions(facts),
                tag("h3", {}, "Routings"),
                _settings(report),
                tag("h3", {}, "Words"),
                _definitions(_WORDS),
            ]
        ),
        summary=False,
    )


def _settings(report: RemixReport) -> Html:
    entries = {line.method: _told(line) for line in report.ordered}
    return _definitions(entries)


def _told(line: RemixLine) -> str:
    parts: list[str] = [line.kind]
    if line.kind != "base":
        parts.append(f"routing changed for {line.changed} of {words.counted(line.items, 'item')}")
    if line.settings:
        parts.append(line.settings)
    if line.refused:
        parts.append(f"left alone: {remix_words.reasons(line)}")
    return "; ".join(parts)


def _definitions(entries: Mapping[str, str]) -> Html:
    shown = {name: value for name, value in entries.items() if value}
    rows = [join([tag("dt", {}, name), tag("dd", {}, value)]) for name, value in shown.items()]
    return tag("dl", {}, *rows)
