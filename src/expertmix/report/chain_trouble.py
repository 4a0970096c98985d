"""What is wrong with a chain, and what to do about it: `troubles`.

A trouble is told only where the interval over texts carries it; without enough texts there is
none. It rests on routes and sizes of updates: whether the model is the worse for it is for its
loss to say.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from expertmix.attribute.chain import Chains, ChainUsage
from expertmix.attribute.passage import Passage
from expertmix.core.estimate import Estimate
from expertmix.report import words

if TYPE_CHECKING:
    from expertmix.experts.chain_updates import LayerUpdates

SWING = 0.25  # of the K experts: what a token must keep more of over two iterations than over one
AGAIN = 0.9  # retention above which an iteration calls the same experts again
HALFWAY = 0.5  # of the way from an even share to all, beyond which K experts take most of the work
OPPOSED = -0.5  # cosine below which an update takes back at least half of the one before
STILL = 0.01  # size of an update, relative to its input, below which it does nothing
SEEN = 30  # calls that an even router would have given an expert that got none


@dataclass(frozen=True, slots=True)
class Trouble:
    """Something to look at.

    Attributes:
        kind: `swing`, `opposed`, `hub`, `dead`, `still` or `again`.
        layer: Name of the layer.
        finding: What is so, with its numbers.
        advice: What to do.
    """

    kind: str
    layer: str
    finding: str
    advice: str


def troubles(chains: Chains, updates: Sequence[LayerUpdates] = ()) -> tuple[Trouble, ...]:
    """What is wrong, layer by layer.

    Args:
        chains: What was counted.
        updates: What was measured, where it was.
    """
    by_name = {one.name: one for one in updates}
    found: list[Trouble] = []
    for layer in chains:
        found += [*_swings(layer), *_hubs(layer), *_dead(layer), *_again(layer)]
        if layer.name in by_name:
            found += [*_opposed(by_name[layer.name]), *_still(by_name[layer.name])]
    return tuple(found)


def share(value: float) -> str:
    """A percentage, with a decimal below ten: of 64 experts, chance is a few per cent."""
    whole = not 0.0005 <= value < 0.0995
    return words.percent(value) if whole else words.percent(1).replace("100", f"{100 * value:.1f}")


def interval(found: Estimate) -> str:
    """`25 % (21 % to 29 %)`; a share without its interval where there is none."""
    value = share(found.value)
    if found.low != found.low:
        return value
    low, high = max(0.0, found.low), min(1.0, found.high)
    return f"{value} ({share(low)} to {share(high)})"


def decimals(found: Estimate, digits: int = 2) -> str:
    """The same for numbers that are no shares."""
    value = words.decimal(found.value, digits)
    if found.low != found.low:
        return value
    return f"{value} ({words.decimal(found.low, digits)} to {words.decimal(found.high, digits)})"


def _swings(layer: ChainUsage) -> Iterator[Trouble]:
    for one, skip in zip(layer.passages, layer.skips, strict=False):
        near, far = one.retention, skip.retention
        if far.low - near.high >= SWING and far.low > skip.independent:
            yield Trouble(
                "swing",
                layer.name,
                f"Routes swing: of a token's experts at iteration #{one.source.step}, "
                f"{interval(near)} are called at #{one.target.step}, but {interval(far)} at "
                f"#{skip.target.step}.",
                "The iterations go back and forth between two sets of experts. Try one iteration "
                "fewer, a smaller scale, or a norm per iteration.",
            )


def _hubs(layer: ChainUsage) -> Iterator[Trouble]:
    top_k, experts = layer.info.top_k, layer.info.num_experts
    even = top_k / experts
    for one, hub in zip(layer.iterations, layer.hub, strict=True):
        if top_k < experts and hub.low > even + HALFWAY * (1 - even):
            yield Trouble(
                "hub",
                layer.name,
                f"Collapse: at iteration #{one.site.step}, {top_k} of {experts} experts take "
                f"{interval(hub)} of the weight; an even share is {share(even)}.",
                "Raise the balance loss (router_aux_loss_coef), or train with a bias on the "
                "router (router_bias), which is kept per iteration.",
            )


def _dead(layer: ChainUsage) -> Iterator[Trouble]:
    calls = sum(int(one.total.calls.sum()) for one in layer.iterations)
    if layer.dead and calls / layer.info.num_experts >= SEEN:
        names = [layer.info.expert_name(expert) for expert in layer.dead]
        each = calls // layer.info.num_experts
        yield Trouble(
            "dead",
            layer.name,
            f"{len(names)} of {layer.info.num_experts} experts are called in no iteration "
            f"({words.listed(names)}), where an even router would have called each "
            f"{words.counted(each, 'time')}.",
            "Other texts may call them. If none do, raise the balance loss, or use fewer experts.",
        )


def _again(layer: ChainUsage) -> Iterator[Trouble]:
    for one in layer.passages:
        if one.chance < AGAIN and one.retention.low > AGAIN:
            yield Trouble("again", layer.name, _repeats(one), _why_again(one))


def _repeats(one: Passage) -> str:
    return (
        f"Iteration #{one.target.step} calls {interval(one.retention)} of the experts of "
        f"#{one.source.step} again; by chance it would be {share(one.chance)}."
    )


def _why_again(one: Passage) -> str:
    if one.independent > AGAIN:
        return "Both iterations always call the same few experts: see to the balance first."
    return (
        "With `shared` or `fixed` gating this is to be expected: try `independent`. Otherwise the "
        "iteration finds nothing new: compare the loss with one iteration fewer."
    )


def _opposed(layer: LayerUpdates) -> Iterator[Trouble]:
    for step, cosine in enumerate(layer.cosine):
        if cosine.high <= OPPOSED:
            yield Trouble(
                "opposed",
                layer.name,
                f"The update of iteration #{step + 1} points against that of #{step}: their "
                f"cosine is {decimals(cosine)}.",
                "One takes back what the other gave. Try a smaller scale, a norm per iteration, "
                "or one iteration fewer.",
            )


def _still(layer: LayerUpdates) -> Iterator[Trouble]:
    for step, size in enumerate(layer.size):
        if size.high < STILL:
            yield Trouble(
                "still",
                layer.name,
                f"Iteration #{step} does next to nothing: its update is {decimals(size, 4)} of "
                f"what it is added to.",
                "A converted model starts so; after training, run fewer iterations "
                "(active_iterations), or give this one a larger scale.",
            )
