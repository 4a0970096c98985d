"""Where the page comes from: the model, what was done to it, the versions, and the words used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from expertmix.report import words
from expertmix.report.markup import Html, join, tag
from expertmix.report.report import Report
from expertmix.report.section import Section

_WORDS = {
    "Token": "a piece of text, often a word or a part of one; the model reads token by token.",
    "Expert": "a part of the model that only works on the tokens that are sent to it.",
    "Router": "the part that decides, for each token, which experts work on it, with what weight.",
    "Layer": "a step of the model's work on a token, with a router and experts of its own.",
    "First choice": "the expert that got the largest weight.",
    "Load": "how many of all calls went to an expert.",
    "Fair share": "what every expert would get if the router spread its calls evenly.",
    "Loss": "how badly the model predicts the next token; lower is better.",
}


_ADAPTER_WORDS = {
    "Token": _WORDS["Token"],
    "Base": "the model without adapters.",
    "Adapter": "a small addition to modules of the base, trained on one kind of text (LoRA).",
    "Router": "the rule that decides, for each token and module, which adapters are added, with "
    "what weight.",
    "Layer": "a step of the model's work on a token; adapters act in several modules of it.",
    "Weight": "how much of an adapter is added; shares are of all weight that adapters got.",
    "First choice": "the adapter that got the largest weight; where weights tie, the one that the "
    "router names first.",
    "Fair share": "what every adapter would get if weight were spread evenly.",
    "Loss": _WORDS["Loss"],
}


def _words(report: Report) -> dict[str, str]:
    return _ADAPTER_WORDS if report.expert == "adapter" else _WORDS


def section(report: Report) -> Section:
    """A list of facts and a glossary."""
    return Section(
        key="about",
        title="About this page",
        reading="Counts are of real tokens; padding is left out. Nothing on this page is fetched "
        "from the network, and it can be kept or sent as one file.",
        body=join(
            [_definitions(_facts(report)), tag("h3", {}, "Words"), _definitions(_words(report))]
        ),
        summary=False,
    )


def interventions(report: Report) -> list[str]:
    """What was applied while recording, in words."""
    return [_described(edit, report) for edit in report.meta.interventions]


def _described(edit: Mapping[str, Any], report: Report) -> str:
    """One intervention; an unknown kind shows what it holds."""
    if "interventions" in edit:
        return "; then ".join(_described(part, report) for part in edit["interventions"])
    parts = [str(edit.get("kind", "edit"))]
    if edit.get("experts") is not None:
        parts.append(_experts(edit["experts"], report))
    if edit.get("sites"):
        parts.append("at all sites" if edit["sites"] == "*" else f"at {edit['sites']}")
    parts += [f"{key} {edit[key]}" for key in ("stage", "mode", "trace", "note") if edit.get(key)]
    parts += [f"for some {key}" for key in ("positions", "samples", "mask") if edit.get(key)]
    return " ".join(parts)


def _experts(numbers: list[int], report: Report) -> str:
    """Names where all sites agree on them."""
    names = report.groups[0].experts if len(report.groups) == 1 and report.groups[0].named else ()
    shown = [
        names[number] if number < len(names) else f"{report.expert} {number}" for number in numbers
    ]
    return words.listed(shown)


def _facts(report: Report) -> dict[str, str]:
    silent = [report.names[site.site] for site in report.usage if not site.total.tokens]
    meta = report.meta
    facts = {
        "Model": meta.model,
        "Fingerprint": meta.fingerprint[:16],
        "Recorded": meta.created,
        "Interventions": "; ".join(interventions(report)) or "none: the model ran as it is",
        f"{report.noun.capitalize()}s that never ran": words.listed(silent),
        "Settings": _pairs(meta.settings),
        "Versions": _pairs(meta.versions),
    }
    return {name: value for name, value in facts.items() if value}


def _pairs(values: Mapping[str, str]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _definitions(entries: Mapping[str, str]) -> Html:
    rows = [join([tag("dt", {}, name), tag("dd", {}, value)]) for name, value in entries.items()]
    return tag("dl", {}, *rows)
