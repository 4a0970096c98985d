"""How the iterations of a chain divide the work: troubles, retention, sizes, and who follows whom.

The charts of a layer are in `chain_pictures`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from expertmix.attribute.chain import Chains, ChainUsage
from expertmix.core.estimate import Estimate
from expertmix.report import words
from expertmix.report.chain_table import chain_table, headline, layer_names
from expertmix.report.chain_trouble import Trouble, decimals, troubles
from expertmix.report.markup import Html, join, tag
from expertmix.report.report import Report
from expertmix.report.section import CellStyle, Section, chart, folded, grid, panels
from expertmix.report.sections import chain_pictures
from expertmix.report.sections.extra import table_section

if TYPE_CHECKING:
    from expertmix.experts.chain_updates import LayerUpdates

_MOST_LAYERS = 4  # of which a trouble is told in full; the others are named


def section(report: Report) -> Section | None:
    """The chains; None where no layer iterates."""
    chains = report.chains
    if chains is None:
        return None
    names = layer_names(chains)
    found = troubles(chains, report.updates)
    sizes = chain_pictures.sizes(names, report.updates)
    pictures = [chain_pictures.layer(layer, names[layer.name]) for layer in chains]
    parts = [
        _warnings(found, names),
        tag("h3", {}, "Do iterations repeat each other?"),
        table_section(chain_table(chains), "chains-kept").body,
        tag("h3", {}, "What does each iteration do?"),
        *(chart(plot) for plot in sizes),
        _numbers(chains, report.updates, names, open_=not sizes),
        tag("h3", {}, "Who follows whom?"),
        _layers(chains, pictures, names),
    ]
    plots = (*sizes, *(plot for picture in pictures for plot in picture.plots))
    return Section(
        key="chains",
        title="How do experts build on each other?",
        headline=_headline(chains, found, names),
        reading=(
            "In these layers experts run several times on a token, and each iteration (#0, #1 …) "
            "reads what the one before made. A retention at chance means that an iteration chooses "
            f"afresh; near {words.percent(1)}, that it calls the same experts again. "
            "The size of an update says how much an iteration changes what it reads."
        ),
        body=join(parts),
        plots=plots,
    )


def _headline(chains: Chains, found: Sequence[Trouble], names: dict[str, str]) -> str:
    if not found:
        return headline(chains)
    layers = list(dict.fromkeys(names[trouble.layer] for trouble in found))
    noun = "layer" if len(layers) == 1 else "layers"
    return f"{headline(chains)} There is something to look at in {noun} {words.listed(layers)}."


def _warnings(found: Sequence[Trouble], names: dict[str, str]) -> Html:
    if not found:
        return Html("")
    kinds = dict.fromkeys(trouble.kind for trouble in found)
    items = [
        item
        for kind in kinds
        for item in _warning([one for one in found if one.kind == kind], names)
    ]
    return tag("div", {"class": "applied"}, tag("p", {}, "What to look at:"), tag("ul", {}, *items))


def _warning(alike: Sequence[Trouble], names: dict[str, str]) -> list[Html]:
    """Troubles of one kind: the advice stands with the first."""
    shown = alike[:_MOST_LAYERS]
    items = [
        tag(
            "li",
            {},
            tag("strong", {}, f"layer {names[one.layer]}"),
            f": {one.finding}",
            f" {one.advice}" if place == 0 or one.advice != shown[0].advice else "",
        )
        for place, one in enumerate(shown)
    ]
    rest = list(dict.fromkeys(names[one.layer] for one in alike[_MOST_LAYERS:]))
    if rest:
        items.append(tag("li", {}, f"The same in {words.listed(rest, 24)}."))
    return items


def _numbers(
    chains: Chains, updates: Sequence[LayerUpdates], names: dict[str, str], *, open_: bool
) -> Html:
    by_name = {one.name: one for one in updates}
    rows = [
        (
            f"{names[layer.name]}#{one.site.step}",
            [
                CellStyle(_sized(by_name.get(layer.name), one.site.step)),
                CellStyle(_turned(by_name.get(layer.name), one.site.step)),
                CellStyle(words.decimal(one.total.balance)),
                CellStyle(words.percent(hub.value)),
                CellStyle(_doubt(layer, place)),
                CellStyle(str(len(one.total.dead))),
            ],
        )
        for layer in chains
        for place, (one, hub) in enumerate(zip(layer.iterations, layer.hub, strict=True))
    ]
    columns = (
        "size of update", "cosine with the one before", "balance", "weight on the K busiest",
        "doubt", "dead",
    )  # fmt: skip
    table = grid("Each iteration in numbers", "layer", columns, rows, css="grid loose short")
    missing = "" if updates else " Sizes were not measured: `expertmix trace` does."
    note = tag(
        "p",
        {"class": "reading"},
        "Size: mean of ‖F(x)‖ / ‖x‖. Balance: 1 when all experts get the same number of calls. "
        "Doubt: 1 when the router cannot tell the experts apart (where its scores were recorded). "
        f"Dead: experts that nobody called in this iteration; the others may.{missing}",
    )
    both = join([table, note])
    return both if open_ else folded("The same as numbers, with balance and dead experts", both)


def _sized(updates: LayerUpdates | None, step: int) -> str:
    return _at(() if updates is None else updates.size, step)


def _turned(updates: LayerUpdates | None, step: int) -> str:
    return _at(() if updates is None else updates.cosine, step - 1)


def _at(estimates: Sequence[Estimate], place: int) -> str:
    return decimals(estimates[place]) if 0 <= place < len(estimates) else words.DASH


def _doubt(layer: ChainUsage, place: int) -> str:
    experts = layer.info.num_experts
    entropy = layer.iterations[place].total.router_entropy
    return words.decimal(entropy / math.log(experts)) if experts > 1 else words.DASH


def _layers(
    chains: Chains, pictures: Sequence[chain_pictures.Pictures], names: dict[str, str]
) -> Html:
    named = [
        (names[layer.name], picture.body) for layer, picture in zip(chains, pictures, strict=True)
    ]
    if len(named) == 1:
        return named[0][1]
    return panels("Layer", "chain-layer", named, lazy=True)
