"""Items one by one: whom each learned from, how its loss fell, how its routing and scores moved."""

from __future__ import annotations

import math
from collections.abc import Sequence

from expertmix.report import remix_words, words
from expertmix.report.markup import Html, join, tag
from expertmix.report.palette import DIVERGING, SEQUENTIAL
from expertmix.report.remix_data import Move, RemixItem, RemixLine, Turn
from expertmix.report.remix_moves import entropy, incoming
from expertmix.report.remix_report import RemixReport
from expertmix.report.section import CellStyle, Section, folded, grid, panels, shade
from expertmix.report.sections.remix_pathway import shifted
from expertmix.report.sparkline import sparkline

_MOST_EXPERTS = 12  # of a layer that are named


def section(report: RemixReport) -> Section | None:
    """A panel of items per method; None where there are no items."""
    shown = [
        (line.method, _items(report, line, number)) for number, line in enumerate(report.studied)
        if report.by_method[line.method]
    ]  # fmt: skip
    if not shown:
        return None
    total = max(len(report.by_method[line.method]) for line in report.studied)
    some = min(report.most, total)
    which = (
        f"Shown are all {words.counted(total, 'item')}"
        if some == total
        else f"Of {words.count(total)} items {some} are shown per method"
    )
    order = (
        "those whose loss changed most first"
        if report.free
        else "flipped answers first, both ways in turn, then those whose loss changed most"
    )
    alone = any(one.alone for line in report.studied for one in report.by_method[line.method])
    last = "; one at least that was left alone is among them" if alone and some < total else ""
    return Section(
        key="samples",
        title="Item by item",
        reading=f"{which}, {order}{last}. Open one to see whom it learned from and where that led.",
        body=panels("Routing", "sample-method", shown) if len(shown) > 1 else shown[0][1],
        summary=False,
    )


def single(report: RemixReport, one: RemixItem) -> Section:
    """One item as a section of its own."""
    return Section(
        key="sample", title=f"{one.name} under {one.method}", headline=verdict(one), reading="",
        body=tag("div", {"class": "samples"}, _inside(report, one)),
    )  # fmt: skip


def verdict(one: RemixItem) -> str:
    """What became of the item."""
    change = f"Loss {words.decimal(one.base_loss, 3)} → {words.decimal(one.loss, 3)}"
    if one.correct is None:
        return f"{change}."
    answers = {
        "gained": "Wrong under the base, right now",
        "lost": "Right under the base, wrong now",
        "": "Right before and after" if one.correct else "Wrong before and after",
    }
    return f"{answers[one.flip]}. {change}."


def _items(report: RemixReport, line: RemixLine, number: int) -> Html:
    return tag(
        "div",
        {"class": "samples"},
        *(_folded(report, one) for one in report.chosen(line.method)),
        tag("p", {"class": "reading"}, _left_alone(line)) if line.refused else Html(""),
    )


def _left_alone(line: RemixLine) -> str:
    return f"Items left alone, with the base's routing: {remix_words.reasons(line)}."


def _folded(report: RemixReport, one: RemixItem) -> Html:
    mark = one.flip or ("left alone" if one.alone else "")
    parts = [tag("b", {}, words.cut(one.name, 60))]
    parts += [tag("span", {"class": f"mark {one.flip}".strip()}, mark)] if mark else []
    parts.append(tag("span", {"class": "soft"}, f"loss {words.signed(one.change, 3)}"))
    return folded(join(parts), join([tag("p", {}, verdict(one)), _inside(report, one)]))


def _inside(report: RemixReport, one: RemixItem) -> Html:
    turn = one.turns[0]
    several = len(one.turns) > 1
    return join(
        [
            tag("p", {"class": "reading"}, f"Group: {one.label}.") if one.label else Html(""),
            _prompt(report, one),
            _options(report, one),
            _more_orders(one) if several else Html(""),
            _reason(turn),
            _neighbors(turn),
            _losses(turn),
            _weights(report, one, turn),
            _others(report, one),
        ]
    )


def _more_orders(one: RemixItem) -> Html:
    return tag(
        "p", {"class": "reading"},
        f"It was asked in {len(one.turns)} orders of its options; scores are means over them. What "
        f"follows is of the first order.",
    )  # fmt: skip


def _prompt(report: RemixReport, one: RemixItem) -> Html:
    if report.texts is None or one.item not in report.texts:
        return Html("")
    return tag("p", {"class": "asked"}, report.texts[one.item][0])


def _options(report: RemixReport, one: RemixItem) -> Html:
    known = () if report.texts is None or one.item not in report.texts else (
        report.texts[one.item][1]
    )  # fmt: skip
    names = [
        known[number] if number < len(known) else _unnamed(one, number)
        for number in range(len(one.scores))
    ]
    choice = one.correct is not None
    best = [_best(scores) for scores in (one.base, one.scores)]
    dense = [
        CellStyle(_score(score), strong=choice and number == _best(one.dense))
        for number, score in enumerate(one.dense)
    ]
    rows = []
    for number, name in enumerate(names):
        cells = [
            CellStyle(_score(one.base[number]), strong=choice and number == best[0]),
            CellStyle(_score(one.scores[number]), strong=choice and number == best[1]),
            CellStyle(_moved(one.base[number], one.scores[number])),
            *dense[number : number + 1],
        ]
        gold = [] if one.correct is None else [CellStyle("right" if number == one.gold else "")]
        rows.append((name, [*gold, *cells]))
    columns = [
        *([] if one.correct is None else ["gold"]), "base", "new", "change",
        *(["dense"] if dense else []),
    ]  # fmt: skip
    table = grid("Scores of the options", "option", columns, rows, css="grid loose")
    note = "Scores are log-probabilities, higher is better" + (
        "; the best of each column is bold." if one.correct is not None else "."
    )
    return join([tag("h3", {}, "Scores"), table, tag("p", {"class": "reading"}, note)])


def _unnamed(one: RemixItem, number: int) -> str:
    return "the answer" if one.correct is None else f"option {number + 1}"


def _score(score: float) -> str:
    return words.decimal(score, 3) if math.isfinite(score) else words.DASH


def _moved(before: float, after: float) -> str:
    known = math.isfinite(before) and math.isfinite(after)
    return words.signed(after - before, 3) if known else words.DASH


def _best(scores: Sequence[float]) -> int:
    return max(
        range(len(scores)), key=lambda n: (-math.inf if math.isnan(scores[n]) else scores[n], -n)
    )


def _reason(turn: Turn) -> Html:
    if not turn.reason:
        return Html("")
    return tag("p", {"class": "applied"}, f"Left alone, with the base's routing: {turn.reason}.")


def _neighbors(turn: Turn) -> Html:
    dropped = (
        f" {words.counted(turn.dropped, 'near-duplicate')} of the item among the references "
        f"{'was' if turn.dropped == 1 else 'were'} left out."
        if turn.dropped
        else ""
    )
    if not turn.neighbors:
        return tag("p", {"class": "reading"}, f"It had no neighbors, or used none.{dropped}")
    top = max(near.weight for near in turn.neighbors) or 1.0
    rows = [
        (
            near.name,
            [
                CellStyle(words.decimal(near.similarity, 3)),
                shade(words.percent(near.weight), SEQUENTIAL[:3], near.weight / top),
            ],
        )
        for near in turn.neighbors
    ]
    table = grid(
        "Neighbors of the item", "neighbor", ("similarity", "kernel weight"), rows, css="grid loose"
    )
    note = tag("p", {"class": "reading"}, dropped.strip()) if dropped else Html("")
    return join([tag("h3", {}, "Neighbors"), table, note])


def _losses(turn: Turn) -> Html:
    known = [loss for loss in turn.losses if math.isfinite(loss)]
    if len(known) < 2:
        return Html("")
    first, last = words.decimal(turn.losses[0], 4), words.decimal(turn.losses[-1], 4)
    said = f"{first} before the first step, {last} after step {len(turn.losses) - 1}."
    drawn = sparkline(turn.losses, f"Loss per step: {said}")
    return join(
        [
            tag("h3", {}, "Loss that was minimized, step by step"),
            drawn,
            tag("p", {"class": "reading"}, said),
        ]
    )


def _weights(report: RemixReport, one: RemixItem, turn: Turn) -> Html:
    if turn.move is None:
        return Html("")
    rows = [row for site in range(len(report.sites)) for row in _layer(report, turn.move, site)]
    most = max(len(cells) for _, cells in rows)
    padded = [(name, [*cells, *[CellStyle("")] * (most - len(cells))]) for name, cells in rows]
    ranks = [_ORDINALS[n] if n < len(_ORDINALS) else f"{n + 1}th" for n in range(most - 2)]
    table = grid(
        "Experts and their weights by layer, before and after, the largest first",
        "layer",
        ["entropy", "divergence", *ranks],
        padded,
        css="grid loose tight",
    )
    note = (
        "Experts that the token calls, each with its weight, the largest first; bold: the base had "
        "not called it. Entropy of the weights and divergence from the base are in nats."
    )
    note += "".join(shifted(report, line) for line in report.lines if line.method == one.method)
    return join([tag("h3", {}, "Weights by layer"), table, tag("p", {"class": "reading"}, note)])


_ORDINALS = ("1st", "2nd", "3rd")


def _layer(report: RemixReport, move: Move, site: int) -> list[tuple[str, list[CellStyle]]]:
    new = incoming(move, site)
    top = max([*move.before[site].values(), *move.after[site].values()], default=1.0) or 1.0
    found = []
    for when, weights in (("before", move.before[site]), ("after", move.after[site])):
        order = sorted(weights, key=lambda expert: -weights[expert])[:_MOST_EXPERTS]
        cells = [
            shade(
                f"{report.experts[expert]}: {words.percent(weights[expert])}",
                SEQUENTIAL[:3], weights[expert] / top, strong=when == "after" and expert in new,
            )
            for expert in order
        ]  # fmt: skip
        divergence = words.decimal(move.kl[site], 3) if when == "after" else words.DASH
        told = [CellStyle(words.decimal(entropy(weights))), CellStyle(divergence)]
        found.append((f"{report.sites[site]}, {when}", [*told, *cells]))
    return found


def _others(report: RemixReport, one: RemixItem) -> Html:
    """The same item under every routing."""
    rows = []
    for line in report.ordered:
        same = [other for other in report.by_method[line.method] if other.item == one.item]
        for other in same:
            place = 0.5 if abs(other.change) < 5e-4 else 0.35 if other.change < 0 else 0.65
            answer = [] if other.correct is None else [
                CellStyle(f"option {_best(other.scores) + 1}"),
                CellStyle("right" if other.correct else "wrong"),
            ]  # fmt: skip
            loss = CellStyle(words.decimal(other.loss, 3))
            rows.append(
                (
                    line.method,
                    [*answer, loss, shade(words.signed(other.change, 3), DIVERGING, place)],
                )
            )
    columns = [*([] if one.correct is None else ["answer", ""]), "loss", "change"]
    table = grid("The item under every routing", "routing", columns, rows, css="grid loose")
    return folded(Html("The same item under every routing"), table)
