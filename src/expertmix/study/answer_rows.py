"""Answers for readers: lines of JSON, views for the terminal, strips for the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from expertmix.core.trace import TraceMeta
from expertmix.report import words
from expertmix.report.answers import AnswerView
from expertmix.report.layers import Layers
from expertmix.report.strips import Strip, StripCollector
from expertmix.study import figures
from expertmix.study.compose_plan import ComposePlan
from expertmix.study.generation import Answer

_TOP = 3  # adapters that a token names


def mean_shares(answers: Sequence[Answer]) -> tuple[float, ...]:
    """Per adapter its share in the weight of all tokens that were made."""
    mass_E = torch.stack([answer.weights.double().sum(0) for answer in answers]).sum(0)
    shares: list[float] = (mass_E / mass_E.sum().clamp(min=1e-300)).tolist()
    return tuple(shares)


def answer_rows(
    plan: ComposePlan, answers: Sequence[Answer], *, text: bool
) -> tuple[dict[str, Any], ...]:
    """A JSON-ready row per answer.

    Args:
        plan: Of the prompts.
        answers: In their order.
        text: With the text of the prompts.
    """
    names = plan.composition.shelf.names
    return tuple(
        _row(answer, prompt.text if text else None, names)
        for answer, prompt in zip(answers, plan.prompts, strict=True)
    )


def _row(answer: Answer, prompt: str | None, names: Sequence[str]) -> dict[str, Any]:
    asked = {} if prompt is None else {"prompt": prompt}
    shares = zip(names, answer.shares.tolist(), strict=True)
    return {
        "where": answer.prompt.where,
        "label": answer.prompt.label,
        **asked,
        "answer": answer.text,
        "shares": figures.named(dict(shares)),
        "tokens": [
            _token(piece, first, weights, names)
            for piece, first, weights in zip(
                words.readable_tokens(answer.pieces),
                answer.first,
                answer.weights.tolist(),
                strict=True,
            )
        ],
    }


def _token(
    piece: str, first: int | None, weights: list[float], names: Sequence[str]
) -> dict[str, Any]:
    """A token, its adapter (null where several tie), and the largest shares of weight."""
    whole = sum(weights) or 1.0
    best = sorted(range(len(names)), key=lambda number: -weights[number])[:_TOP]
    return {
        "token": piece,
        "adapter": None if first is None else names[first],
        "weights": {names[n]: figures.number(weights[n] / whole) for n in best if weights[n]},
    }


def answer_views(plan: ComposePlan, answers: Sequence[Answer]) -> tuple[AnswerView, ...]:
    """For the terminal."""
    return tuple(
        AnswerView(
            title=_title(answer),
            prompt=prompt.text,
            pieces=tuple(words.readable_tokens(answer.pieces)),
            first=tuple(answer.first),
            shares=tuple(answer.shares.tolist()),
        )
        for answer, prompt in zip(answers, plan.prompts, strict=True)
    )


def strips_of(
    plan: ComposePlan, answers: Sequence[Answer], meta: TraceMeta, *, text: bool
) -> tuple[Strip, ...]:
    """For the page: answers whose decisions were kept, token by token.

    Args:
        plan: Of the prompts.
        answers: In their order.
        meta: Of their trace.
        text: With token strings, and the prompts.
    """
    both = zip(answers, plan.prompts, strict=True)
    detailed = [(one, prompt) for one, prompt in both if one.made is not None and one.ids]
    layers = Layers.of(meta)
    shown = meta.sites if layers is None else layers.shown
    collector = StripCollector(shown, max(1, len(detailed)))
    for answer, _ in detailed:
        assert answer.made is not None
        made = answer.made if layers is None else layers.pooled(answer.made)
        readable = replace(made, labels={}, text=made.text if text else None)
        collector.add(readable)
    return tuple(
        replace(strip, label=_title(answer), prompt=prompt.text if text else None)
        for strip, (answer, prompt) in zip(collector.result(), detailed, strict=True)
    )


def _title(answer: Answer) -> str:
    label = answer.prompt.label
    return f"{answer.prompt.where} ({label})" if label else answer.prompt.where
