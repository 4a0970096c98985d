"""Controls without routing: a vote among neighbors, and the neighbors as examples in the prompt.

Random neighbors are `Neighbors.random`, shuffled labels `ReferenceSet.shuffled_labels`; one global
delta and the oracles are methods (`optimize.table`). Knows samples; no model.

Legend: O options, k neighbors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from expertmix.core.pathway import Question
from expertmix.optimize.samples import Sample

_FLOOR = 0.01  # weight of the base in a vote: breaks ties, and keeps losses finite


def vote(
    base_O: Sequence[float], neighbors: Sequence[Sample], weights_k: Sequence[float]
) -> list[float]:
    """Scores of options by the kernel-weighted vote of neighbors for the place of their answer.

    p = (1 − ε) Σ K [gold = place] / Σ K + ε softmax(base), ε = 0.01; the scores are log p. A vote
    for a place says something where places have a meaning: a letter, or a yes. In style text, where
    options are not shown in any order, it should say nothing, which is what this control tests. A
    neighbor whose answer is at a place that the item lacks has no vote; without votes the base
    decides.

    Args:
        base_O: The base's scores.
        neighbors: References.
        weights_k: Their kernel weights.
    """
    votes = [0.0] * len(base_O)
    for sample, weight in zip(neighbors, weights_k, strict=True):
        if sample.gold is not None and sample.gold < len(votes):
            votes[sample.gold] += weight
    total = sum(votes)
    if not total:
        return list(base_O)
    top = max(base_O)
    shares = [math.exp(score - top) for score in base_O]
    return [
        math.log((1 - _FLOOR) * one / total + _FLOOR * share / sum(shares) + 1e-30)
        for one, share in zip(votes, shares, strict=True)
    ]


def with_examples(
    sample: Sample,
    examples: Sequence[Sample],
    *,
    separator: tuple[int, ...],
    begin: tuple[int, ...] = (),
    context: int | None = None,
) -> tuple[Sample, int]:
    """In-context learning: solved examples in front of a prompt, the first of them nearest to it.

    Args:
        sample: The question.
        examples: Solved ones, the most similar first; it comes last, next to the question.
        separator: Tokens between questions.
        begin: Tokens that begin every prompt, such as a beginning-of-text token; they stand once.
        context: Tokens that the model reads; the least similar examples that do not fit are left
            out.

    Returns:
        The sample with a longer prompt, and how many examples it has.
    """
    question = sample.question
    bare = _bare(question.prompt, begin)
    longest = max(map(len, question.options))
    room = math.inf if context is None else context - len(question.prompt) - longest
    front: tuple[int, ...] = ()
    used = 0
    for example in examples:
        shown = example.question
        solved = (*_bare(shown.prompt, begin), *shown.options[example.gold or 0], *separator)
        if len(front) + len(solved) > room:
            break
        front, used = (*solved, *front), used + 1
    start = begin if question.prompt[: len(begin)] == begin else ()
    longer = Question((*start, *front, *bare), question.options)
    return replace(sample, question=longer), used


def _bare(prompt: tuple[int, ...], begin: tuple[int, ...]) -> tuple[int, ...]:
    return prompt[len(begin) :] if begin and prompt[: len(begin)] == begin else prompt
