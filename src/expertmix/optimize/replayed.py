"""Outcomes as an ordinary intervention, which `record` applies to the whole model.

Legend: D decision tokens, L critical sites, E experts, S rows of the batch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from expertmix.core.intervention import InOrder, Intervention
from expertmix.core.reweight import Reweight
from expertmix.core.site import SiteInfo
from expertmix.errors import ConfigError
from expertmix.optimize.outcome import Outcome

Place = tuple[int, int]  # number of a decision token's values, and its position in the text


def intervention(
    outcomes: Sequence[Outcome],
    infos: Sequence[SiteInfo],
    *,
    decisions: int,
    scored: bool,
    options: bool,
    rows: Sequence[Sequence[int]] | None = None,
    new_tokens: int = 0,
) -> InOrder:
    """Edits that give a batch the routing that was found; see `Remix.intervention`."""
    rows = _rows(outcomes, options) if rows is None else rows
    if len(rows) != len(outcomes):
        raise ConfigError(f"{len(outcomes)} outcomes need as many lists of rows, not {len(rows)}")
    parts: list[Intervention] = []
    for mode in ("set", "add"):
        placed: dict[tuple[int, tuple[int, ...]], list[tuple[int, Tensor]]] = defaultdict(list)
        for outcome, mine in zip(outcomes, rows, strict=True):
            if not outcome.changed or outcome.mode != mode:
                continue
            for option, row in enumerate(mine):
                places = _places(outcome, option, decisions, scored, options, new_tokens)
                for slot, positions in places.items():
                    placed[slot, positions].append((row, _values(outcome, slot, infos)))
        for (_, positions), found in placed.items():
            parts += _edits(found, positions, infos, add=mode == "add")
    return InOrder(*parts)


def _rows(outcomes: Sequence[Outcome], options: bool) -> list[list[int]]:
    """One row per outcome, or one per option of each."""
    rows, begin = [], 0
    for outcome in outcomes:
        count = len(outcome.sample.question.options) if options else 1
        rows.append(list(range(begin, begin + count)))
        begin += count
    return rows


def _places(
    outcome: Outcome, option: int, decisions: int, scored: bool, options: bool, new_tokens: int
) -> dict[int, tuple[int, ...]]:
    """Which values serve which positions: slots count back from -1, the last prompt token."""
    question = outcome.sample.question
    length = len(question.prompt)
    begin = length if options or scored else 0  # from the start, or back from the prompt's end
    slots = range(-min(decisions, length), 0)
    places: dict[int, tuple[int, ...]] = {slot: (begin + slot,) for slot in slots}
    after = new_tokens
    if options:
        if option >= len(question.options):
            raise ConfigError(
                f"sample {outcome.sample.name!r} has {len(question.options)} options, "
                f"{option + 1} rows are named for it"
            )
        after = len(question.options[option]) - 1
    if scored:
        places[-1] += tuple(range(length, length + after))
    return places


def _values(outcome: Outcome, slot: int, infos: Sequence[SiteInfo]) -> Tensor:
    """(L, E): weights of the K experts that are called, or the shift of the logits."""
    values = outcome.values
    assert values is not None
    values_LE = values[max(slot, -len(values))].float()
    if outcome.mode == "add":
        return values_LE
    mass_L = outcome.mass[max(slot, -len(outcome.mass))]
    best_LK, experts_LK = values_LE.topk(max(info.top_k for info in infos), dim=1)
    weights_LK = mass_L[:, None] * best_LK.softmax(1)
    return torch.zeros_like(values_LE).scatter(1, experts_LK, weights_LK)


def _edits(
    found: Sequence[tuple[int, Tensor]],
    positions: tuple[int, ...],
    infos: Sequence[SiteInfo],
    *,
    add: bool,
) -> list[Reweight]:
    rows = tuple(row for row, _ in found)
    values_SLE = torch.stack([values for _, values in found]).detach().cpu()
    return [
        Reweight(
            str(info.site), values_SLE[:, number], stage="logits" if add else "weights",
            mode="add" if add else "set", samples=rows, positions=positions,
        )
        for number, info in enumerate(infos)
    ]  # fmt: skip
