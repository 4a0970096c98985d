"""What the numbers of re-mixed routing say in words, and what they do not say."""

from __future__ import annotations

import math
from collections.abc import Sequence

from expertmix.core.estimate import Estimate
from expertmix.report import words
from expertmix.report.remix_data import RemixLine

STEERING = (
    "The oracle is told the right answer and moves the routing toward it, so it bounds what "
    "routing could gain. But a routing that can be pushed to any answer would give such a gain as "
    "well. The wrong-label oracle is the test: the same optimization, toward a wrong answer. Where "
    "it makes right answers fall, the oracle's gain shows that the model can be steered, and not "
    "only that its router was wrong."
)


def share(value: float, digits: int = 1) -> str:
    """A share as a percentage with decimals; a dash for nan."""
    return words.DASH if math.isnan(value) else f"{words.decimal(100 * value, digits)}\u202f%"


def p_value(value: float) -> str:
    """Three decimals; a dash for nan."""
    if math.isnan(value):
        return words.DASH
    return "<0.001" if value < 0.001 else words.decimal(value, 3)


def share_interval(found: Estimate) -> str:
    """`57.0 % [52, 62]`."""
    if math.isnan(found.low):
        return share(found.value)
    low, high = (words.decimal(100 * end, 0) for end in (found.low, found.high))
    return f"{share(found.value)} [{low}, {high}]"


def change_interval(found: Estimate) -> str:
    """`+0.012 [-0.004, +0.031]`."""
    if math.isnan(found.low):
        return words.signed(found.value, 3)
    low, high = (words.signed(end, 3) for end in (found.low, found.high))
    return f"{words.signed(found.value, 3)} [{low}, {high}]"


def times(relative: float) -> str:
    """`1.8 x`."""
    return words.DASH if math.isnan(relative) else f"{words.decimal(relative, 2)}\u202f\u00d7"


def headline(lines: Sequence[RemixLine]) -> str:
    """Which method is shown to help, by how much and at what price; or that none is."""
    methods = [line for line in lines if line.competes]
    if not methods:
        return "No method was run beside the base, so nothing is claimed."
    if math.isnan(lines[0].accuracy.value):
        return _of_losses(methods, lines)
    helped = sorted((line for line in methods if line.helps), key=lambda line: -line.accuracy.value)
    parts = [_helps(lines[0], helped)] if helped else [_nothing(methods)]
    parts += [_harms(line) for line in methods if line.harms]
    if not helped:
        parts += _losses_only(methods, lines)
    return " ".join(parts)


def _helps(base: RemixLine, helped: Sequence[RemixLine]) -> str:
    best, others = helped[0], helped[1:]
    said = (
        f"{words.named(best.method)} is shown to help: {share(best.accuracy.value)} right instead "
        f"of {share(base.accuracy.value)} ({counts(best)}){_price(best)}."
    )
    if best.doubted:
        names = words.listed([words.named(name) for name in best.doubted], 4)
        said += (
            f" It is not shown to be better than {names}, so the gain need not come from what "
            f"similar items teach."
        )
    if others:
        also = [
            f"{words.named(line.method)} ({share(line.accuracy.value)}{_price(line)})"
            for line in others
        ]
        said += f" Also shown to help: {words.listed(also)}."
    return said


def _price(line: RemixLine) -> str:
    if math.isnan(line.relative):
        return ""
    return f", at {words.decimal(line.relative, 1)} times the base's time"


def counts(line: RemixLine) -> str:
    """`12 gained, 3 lost, p = 0.035`: corrected where it is."""
    corrected = not math.isnan(line.p_holm)
    return f"{line.gained} gained, {line.lost} lost, {p_said(line.p_holm if corrected else line.p)}"


def p_said(value: float) -> str:
    """`p = 0.035` that no line break takes apart."""
    shown = p_value(value)
    return f"p\u00a0{shown}" if shown.startswith("<") else f"p\u00a0=\u00a0{shown}"


def reasons(line: RemixLine) -> str:
    """Why items were left alone, without what is peculiar to each: `not fragile (18)`."""
    found: dict[str, int] = {}
    for reason, count in line.refused.items():
        kind = reason.partition(":")[0]
        found[kind] = found.get(kind, 0) + count
    return words.listed([f"{kind} ({count})" for kind, count in found.items()])


def _nothing(methods: Sequence[RemixLine]) -> str:
    still = [line for line in methods if not line.gained and not line.lost]
    if len(still) == len(methods):
        return "No method is shown to help: no answer changed."
    near = max(methods, key=lambda line: line.gained - line.lost)
    return (
        f"No method is shown to help. The largest difference in right answers, of "
        f"{words.named(near.method)} ({counts(near)}), may be chance."
        if not near.harms
        else "No method is shown to help."
    )


def _harms(line: RemixLine) -> str:
    return f"{words.named(line.method)} is shown to harm ({counts(line)})."


def _losses_only(methods: Sequence[RemixLine], lines: Sequence[RemixLine]) -> list[str]:
    lower = [line for line in methods if line.change.high < 0]
    if not lower:
        return []
    names = [f"{words.named(line.method)}, {change_interval(line.change)} nats" for line in lower]
    return [
        f"Loss does fall ({words.listed(names)}), which is no proof of better answers."
        f"{_controls_too(lines)}"
    ]


def _controls_too(lines: Sequence[RemixLine]) -> str:
    """Controls whose loss falls as well."""
    same = [line for line in lines if line.kind == "control" and line.change.high < 0]
    if not same:
        return ""
    names = words.listed([words.named(line.method) for line in same], 4)
    return f" It falls as well under the {'control' if len(same) == 1 else 'controls'} {names}."


def _of_losses(methods: Sequence[RemixLine], lines: Sequence[RemixLine]) -> str:
    """Of texts without a choice."""
    lower = sorted((one for one in methods if one.change.high < 0), key=lambda x: x.change.value)
    higher = [one for one in methods if one.change.low > 0]
    said = "No method is shown to lower the loss."
    if lower:
        best = lower[0]
        said = (
            f"{words.named(best.method)} is shown to lower the loss, by "
            f"{words.decimal(-best.change.value, 3)} nats (change {change_interval(best.change)})"
            f"{_price(best)}."
        )
    if lower[1:]:
        names = [words.named(line.method) for line in lower[1:]]
        said += f" Also shown to lower it: {words.listed(names)}."
    if lower:
        said += _controls_too(lines)
    if higher:
        verb = "raises" if len(higher) == 1 else "raise"
        said += f" {words.listed([words.named(one.method) for one in higher])} {verb} it."
    return said
