"""Questions as rows of tokens: a prompt, then its options side by side.

All options of a question share one prompt, so a row holds it once, and a mask keeps options from
seeing each other: a pass over the row gives what one pass per option would. The first part of a
row is its *context*, the prompt without its D last tokens; the rest, the decision tokens and the
options, is its *tail*. Contexts are padded on the left, tails on the right.

Knows token counts and positions; no model.

Legend: B rows, P columns of contexts, A columns of tails, S = P + A, O options, W longest option.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from expertmix.bindings.slots import Slots
from expertmix.core.pathway import Question

PROMPT = -1  # group of a tail token that every option sees


@dataclass(frozen=True, eq=False, slots=True)
class Tree:
    """B rows.

    Attributes:
        context: P.
        ids: (B, S) token ids, 0 where padded.
        real: (B, S) bool.
        position: (B, S) place in its own text, 0 where padded.
        group: (B, S) number of the option that a token belongs to; PROMPT of the prompt.
        decision: (B, A) bool: the last D tokens of the prompt.
        source: (B, O, W) column of the tail whose output predicts an option's token.
        target: (B, O, W) the token ids that are predicted.
        predicted: (B, O, W) bool: there is such a token.
    """

    context: int
    ids: Tensor
    real: Tensor
    position: Tensor
    group: Tensor
    decision: Tensor
    source: Tensor
    target: Tensor
    predicted: Tensor

    @property
    def tail(self) -> int:
        """A."""
        return self.ids.shape[1] - self.context

    def visible(self, window: int | None = None) -> Tensor:
        """(B, S, S) bool: which column (last axis) each column may attend to; itself at least."""
        key, query = self.position[:, None, :], self.position[:, :, None]
        mine = self.group[:, :, None] == self.group[:, None, :]
        shared = (self.group == PROMPT)[:, None, :]
        seen = (key <= query) & (mine | shared) & self.real[:, None, :] & self.real[:, :, None]
        if window is not None:
            seen &= query - key < window
        return seen | torch.eye(seen.shape[-1], dtype=torch.bool, device=seen.device)

    def slots(self, decisions: int, scored: bool) -> Slots:
        """The decision tokens of the tails; with `scored`, the options' tokens too."""
        back = (self.decision.flip(1).cumsum(1).flip(1) - 1).clamp(min=0)
        chosen = self.real[:, self.context :] if scored else self.decision
        row, column = chosen.nonzero(as_tuple=True)
        flat = row * self.tail + column
        return Slots(flat, row, back[row, column], len(self.ids), decisions)

    def to(self, device: torch.device) -> Tree:
        """The same on a device."""
        tensors: dict[str, Any] = {
            field.name: getattr(self, field.name).to(device) for field in fields(self)[1:]
        }
        return replace(self, **tensors)


def plant(questions: Sequence[Question], decisions: int) -> Tree:
    """Lay questions out as rows.

    Args:
        questions: At least one.
        decisions: D: how many tokens of a prompt's end are decision tokens; a shorter prompt has
            only those that it has.
    """
    contexts = [max(0, len(one.prompt) - decisions) for one in questions]
    tails = [Tail.of(one, start) for one, start in zip(questions, contexts, strict=True)]
    left, right = max(contexts), max(len(tail.ids) for tail in tails)
    options = max(len(one.options) for one in questions)
    width = max(len(option) for one in questions for option in one.options)
    shape = (len(questions), left + right)
    tree = Tree(
        left,
        torch.zeros(shape, dtype=torch.int64),
        torch.zeros(shape, dtype=torch.bool),
        torch.zeros(shape, dtype=torch.int64),
        torch.full(shape, PROMPT),
        torch.zeros(len(questions), right, dtype=torch.bool),
        torch.zeros(len(questions), options, width, dtype=torch.int64),
        torch.zeros(len(questions), options, width, dtype=torch.int64),
        torch.zeros(len(questions), options, width, dtype=torch.bool),
    )
    for row, (one, start, tail) in enumerate(zip(questions, contexts, tails, strict=True)):
        front, end = slice(left - start, left), left + len(tail.ids)
        tree.ids[row, front] = torch.tensor(one.prompt[:start], dtype=torch.int64)
        tree.position[row, front] = torch.arange(start)
        tree.ids[row, left:end] = torch.tensor(tail.ids)
        tree.position[row, left:end] = torch.tensor(tail.position)
        tree.group[row, left:end] = torch.tensor(tail.group)
        tree.real[row, left - start : end] = True
        tree.decision[row, : len(one.prompt) - start] = True
        for number, (source, target) in enumerate(zip(tail.source, one.options, strict=True)):
            tree.source[row, number, : len(source)] = torch.tensor(source)
            tree.target[row, number, : len(source)] = torch.tensor(target)
            tree.predicted[row, number, : len(source)] = True
    return tree


@dataclass(frozen=True, slots=True)
class Tail:
    """The decision tokens and the options of one question.

    The last token of an option is only predicted, never read.

    Attributes:
        ids: Of its tokens.
        position: Of each in its own text.
        group: Number of the option of each, or PROMPT.
        source: Per option, who predicts its tokens.
    """

    ids: list[int]
    position: list[int]
    group: list[int]
    source: list[list[int]]

    @classmethod
    def of(cls, one: Question, start: int) -> Tail:
        """The tail of a question whose context has `start` tokens."""
        ids = list(one.prompt[start:])
        position = list(range(start, len(one.prompt)))
        group, source, last = [PROMPT] * len(ids), [], len(ids) - 1
        for number, option in enumerate(one.options):
            read, first = option[:-1], len(ids)
            source.append([last, *range(first, first + len(read))])
            ids += read
            position += range(len(one.prompt), len(one.prompt) + len(read))
            group += [number] * len(read)
        return cls(ids, position, group, source)

    def kept(self, option: int) -> list[int]:
        """Numbers of its tokens that one option needs."""
        return [n for n, group in enumerate(self.group) if group in (PROMPT, option)]
