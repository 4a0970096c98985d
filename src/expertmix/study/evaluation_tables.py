"""An evaluation for readers: tables, a check of routing for the page, and JSON-ready figures."""

from __future__ import annotations

import math
from typing import Any

from expertmix.core.estimate import Estimate
from expertmix.report import words
from expertmix.report.routing_check import RoutingCheck
from expertmix.report.table import Cell, Table
from expertmix.study import figures
from expertmix.study.evaluation import Evaluation

_TO = "\u2026"  # between the ends of an interval: without blanks, which would break the line


def tables(evaluation: Evaluation) -> tuple[Table, ...]:
    """Routers by measure, and label by router where there are several of either."""
    both = [routers_table(evaluation)]
    if len(evaluation.names) > 1 and len(evaluation.corpus.labels) > 1:
        both.append(labels_table(evaluation))
    return tuple(both)


def routers_table(evaluation: Evaluation) -> Table:
    """Per router: loss, difference to the main one, accuracy, share of the oracle's gain."""
    several, owned = len(evaluation.names) > 1, bool(evaluation.own_labels)
    gain = any(evaluation.recovered(name) is not None for name in evaluation.names)
    columns = ["router", "loss", *["difference"] * several, *["own token", "own text"] * owned]
    return Table(
        title="Routers on the same texts" if several else "How the texts are read",
        columns=(*columns, *["gain recovered"] * gain),
        rows=tuple(_row(evaluation, name, several, owned, gain) for name in evaluation.names),
        headline=_headline(evaluation) if several else "",
        note=_note(evaluation, several, owned, gain),
    )


def _row(
    evaluation: Evaluation, name: str, several: bool, owned: bool, gain: bool
) -> tuple[Cell, ...]:
    cells: list[Cell] = [name, _numbers(evaluation.loss(name))]
    if several:
        main = name == evaluation.main
        cells.append(None if main else _numbers(evaluation.difference(name), sign=True))
    if owned:
        cells += [_percent(evaluation.accuracy(name)), _percent(evaluation.text_accuracy(name))]
    if gain:
        fixed = name in (evaluation.base, evaluation.oracle)  # 0 and 1, by definition
        found = None if fixed else evaluation.recovered(name)
        cells.append(_percent(found, interval=True))
    return tuple(cells)


def _numbers(found: Estimate, *, sign: bool = False) -> str:
    show = words.signed if sign else words.decimal
    value = show(found.value, 3)
    if math.isnan(found.low):
        return value
    return f"{value} [{words.decimal(found.low)}{_TO}{words.decimal(found.high)}]"


def _percent(found: Estimate | None, *, interval: bool = False) -> str | None:
    if found is None or math.isnan(found.value):
        return None
    value = words.percent(found.value)
    if not interval or math.isnan(found.low):
        return value
    return f"{value} [{100 * found.low:.0f}{_TO}{100 * found.high:.0f}]".replace("-", "\u2212")


def _headline(evaluation: Evaluation) -> str:
    others = [name for name in evaluation.names if name != evaluation.main]
    found = {name: evaluation.difference(name) for name in others}
    better = [name for name, one in found.items() if one.clear and one.value < 0]
    worse = [name for name, one in found.items() if one.clear and one.value > 0]
    level = [name for name in others if name not in better and name not in worse]
    verdicts = {"better": better, "worse": worse, "not clearly different": level}
    told = [
        f"{verdict}: {words.listed([f'`{name}`' for name in names])}"
        for verdict, names in verdicts.items()
        if names
    ]
    return f"Compared with `{evaluation.main}`, {'; '.join(told)}."


def _note(evaluation: Evaluation, several: bool, owned: bool, gain: bool) -> str:
    parts = [
        f"The {words.counted(len(evaluation.corpus), 'text')} were read, not answered. Loss is in "
        f"nats per token, lower is better; in brackets 95 % intervals of a bootstrap over texts."
    ]
    if several:
        parts.append(
            f"Differences are to {evaluation.main}, on the same texts; above zero is worse."
        )
    if owned:
        parts.append(
            f"Own token is the share of tokens for which the adapter of the text's label had most "
            f"weight over all sites, own text that of whole texts; chance is "
            f"{words.even_share(_adapters(evaluation))}."
        )
    if gain:
        parts.append(
            "Gain recovered is the loss that a router takes off the base's, as a share of what the "
            "oracle takes off, which is told the adapter of each text."
        )
    return " ".join(parts)


def _adapters(evaluation: Evaluation) -> int:
    """How many there are; 0 where nothing was routed."""
    counts = [one.routing for one in evaluation.readings.values() if one.routing is not None]
    return len(counts[0].experts) if counts else 0


def labels_table(evaluation: Evaluation) -> Table:
    """Loss of every label under every router."""
    rows: list[tuple[Cell, ...]] = [
        (label, *(evaluation.loss(name, label).value for name in evaluation.names))
        for label in evaluation.corpus.labels
    ]
    everything = (evaluation.loss(name).value for name in evaluation.names)
    return Table(
        title="Loss by text and router",
        columns=("text", *evaluation.names),
        rows=(*rows, (words.all_text(evaluation.corpus.labels), *everything)),
        note="Mean next-token loss in nats; lower is better.",
        best="lowest",
    )


def routing_check(evaluation: Evaluation, name: str) -> RoutingCheck | None:
    """What the page needs to draw labels against adapters; None where labels name none."""
    tokens, texts = evaluation.accuracy(name), evaluation.text_accuracy(name)
    counts = evaluation.readings[name].routing
    if tokens is None or texts is None or counts is None:
        return None
    by_level = evaluation.level_accuracy(name)
    return RoutingCheck(
        experts=counts.experts,
        shares=evaluation.confusion(name),
        tokens=tokens.value,
        texts=texts.value,
        layers={layer: by_level[layer] for layer in counts.levels.layers},
        kinds={kind: by_level[kind] for kind in counts.levels.kinds},
    )


def evaluation_figures(evaluation: Evaluation) -> dict[str, Any]:
    """JSON-ready: every number of the tables, by label too, and the loss of every text."""
    labels, adapters = evaluation.corpus.labels, _adapters(evaluation)
    return {
        "main": evaluation.main,
        "texts": len(evaluation.corpus),
        "draws": evaluation.draws,
        "seed": evaluation.seed,
        "chance": figures.number(1 / adapters) if adapters else None,
        "routers": {
            name: {
                **_measures(evaluation, name, None),
                "by_label": {label: _measures(evaluation, name, label) for label in labels},
                "confusion": _confusion(evaluation, name),
                "own_by_level": _levels(evaluation, name),
                "losses": _losses(evaluation, name),
                "seconds": figures.number(evaluation.readings[name].seconds),
            }
            for name in evaluation.names
        },
    }


def _measures(evaluation: Evaluation, name: str, label: str | None) -> dict[str, Any]:
    return {
        "loss": _estimate(evaluation.loss(name, label)),
        "difference": _estimate(evaluation.difference(name, label)),
        "own_token": _estimate(evaluation.accuracy(name, label)),
        "own_text": _estimate(evaluation.text_accuracy(name, label)),
        "gain_recovered": _estimate(evaluation.recovered(name, label)),
    }


def _estimate(found: Estimate | None) -> list[float | None] | None:
    """[value, low, high]."""
    return None if found is None else figures.numbers((found.value, found.low, found.high))


def _confusion(evaluation: Evaluation, name: str) -> dict[str, list[float | None]]:
    return {label: figures.numbers(row) for label, row in evaluation.confusion(name).items()}


def _levels(evaluation: Evaluation, name: str) -> dict[str, float | None]:
    """Without single sites, of which there are hundreds."""
    counts = evaluation.readings[name].routing
    known = {} if counts is None else evaluation.level_accuracy(name)
    single = set() if counts is None else set(counts.levels.sites)
    return figures.named({key: value for key, value in known.items() if key not in single})


def _losses(evaluation: Evaluation, name: str) -> list[float | None]:
    """Per text, nats per predicted token."""
    reading = evaluation.readings[name]
    pairs = zip(reading.losses, reading.predicted, strict=True)
    return figures.numbers(loss / tokens if tokens else math.nan for loss, tokens in pairs)
