"""How far iterations repeat each other: the table of a page and of a terminal."""

from __future__ import annotations

from expertmix.attribute.chain import Chains
from expertmix.core.site import Site
from expertmix.report import places
from expertmix.report.chain_trouble import interval, share
from expertmix.report.table import Cell, Table


def layer_names(chains: Chains) -> dict[str, str]:
    """A short name for each layer, by its module."""
    sites = [Site(layer.name) for layer in chains]
    return {site.name: short for site, short in places.short_names(sites).items()}


def chain_table(chains: Chains) -> Table:
    """Retention from each iteration to the next, layer by layer, against chance.

    Args:
        chains: At least one layer.
    """
    names = layer_names(chains)
    rows: list[tuple[Cell, ...]] = [
        (
            names[layer.name],
            f"#{one.source.step} to #{one.target.step}",
            interval(one.retention),
            share(one.chance),
            share(one.independent),
        )
        for layer in chains
        for one in layer.passages
    ]
    return Table(
        title="From iteration to iteration",
        columns=(
            "layer",
            "iterations",
            "experts called again",
            "even chance",
            "chance at this load",
        ),
        rows=tuple(rows),
        headline=headline(chains),
        note="Which share of a token's experts the next iteration calls again, with the 95 % "
        "interval over texts. The even chance is K of N; the chance at this load is what two "
        "iterations with the same favorites would share without regard to each other.",
    )


def chain_tables(chains: Chains | None) -> tuple[Table, ...]:
    """The table, or none where no layer iterates."""
    return (chain_table(chains),) if chains else ()


def headline(chains: Chains) -> str:
    """Where iterations repeat each other most, and least."""
    known = [
        (layer, one)
        for layer in chains
        for one in layer.passages
        if one.retention.value == one.retention.value
    ]
    if not known:
        return "No token called experts in two iterations."
    names = layer_names(chains)
    noun = places.noun({Site(name): short for name, short in names.items()})
    most = max(known, key=lambda pair: pair[1].retention.value)
    least = min(known, key=lambda pair: pair[1].retention.value)
    found = [
        f"{share(one.retention.value)} at {noun} {names[layer.name]} "
        f"(#{one.source.step} to #{one.target.step}; by chance {share(one.chance)})"
        for layer, one in dict.fromkeys((most, least))
    ]
    if len(found) == 1:
        return f"The next iteration calls {found[0]} of a token's experts again."
    return f"The next iteration calls again from {found[1]} to {found[0]} of a token's experts."
