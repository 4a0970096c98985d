"""What came of a run, as JSON-ready dicts: losses, prompts, and chains where there are any."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from expertmix.attribute.chain import Chains, ChainUsage
from expertmix.attribute.passage import Passage
from expertmix.core.estimate import Estimate
from expertmix.experts.chain_updates import LayerUpdates
from expertmix.report.chain_trouble import troubles
from expertmix.study import figures
from expertmix.study.tracing import Run


def losses(done: Run) -> dict[str, Any]:
    """Of all text and of each label."""
    return {"all": figures.number(done.loss()), "by_label": figures.named(done.by_label())}


def prompts(done: Run) -> list[dict[str, Any]]:
    """What was read, and its loss."""
    return [
        {
            "sample": number,
            "where": sample.where,
            "label": sample.label,
            "tokens": len(sample.ids),
            "cut": sample.cut,
            "loss": figures.number(loss),
        }
        for number, (sample, loss) in enumerate(zip(done.corpus.samples, done.losses, strict=True))
    ]


def chained(chains: Chains, updates: Sequence[LayerUpdates]) -> dict[str, Any]:
    """Retention, chance, entry experts, sizes of updates, and troubles; empty without chains."""
    if not chains:
        return {}
    by_name = {one.name: one for one in updates}
    return {
        "chains": [_layer(layer, by_name.get(layer.name)) for layer in chains],
        "chain_troubles": [
            {"kind": one.kind, "layer": one.layer, "finding": one.finding, "advice": one.advice}
            for one in troubles(chains, updates)
        ],
    }


def _layer(layer: ChainUsage, updates: LayerUpdates | None) -> dict[str, Any]:
    return {
        "layer": layer.name,
        "iterations": [one.site.step for one in layer.iterations],
        "passages": [_passage(one) for one in (*layer.passages, *layer.skips)],
        "entries": list(layer.entries),
        "accumulators": list(layer.accumulators),
        "dead_in_all": list(layer.dead),
        "update_size": _estimates(() if updates is None else updates.size),
        "update_cosine": _estimates(() if updates is None else updates.cosine),
    }


def _passage(one: Passage) -> dict[str, Any]:
    return {
        "from": one.source.step,
        "to": one.target.step,
        "retention": _estimate(one.retention),
        "chance": figures.number(one.chance),
        "chance_at_load": figures.number(one.independent),
    }


def _estimates(found: Sequence[Estimate]) -> list[dict[str, float | None]]:
    return [_estimate(one) for one in found]


def _estimate(one: Estimate) -> dict[str, float | None]:
    return figures.named({"value": one.value, "low": one.low, "high": one.high})
