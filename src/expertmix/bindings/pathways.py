"""A model opened for pathways: `open_pathways` chooses how it is read again, and proves it.

The exact suffix where the model allows it, full passes elsewhere. Which of the two it is, is not
believed but measured: at the start both read some made-up texts, with and without pathways.

Knows no method and no task.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from expertmix.bindings.critical import Layers, critical_sites
from expertmix.bindings.record import bind
from expertmix.bindings.suffix import Suffix
from expertmix.bindings.transformers import TransformersMoE
from expertmix.bindings.whole import Whole
from expertmix.core.pathway import Mode, Pathway, Pathways, Question
from expertmix.core.progress import Progress, quiet
from expertmix.core.protocols import Routed
from expertmix.errors import ConfigError, ExpertmixError, UnsupportedModelError

_TOLERANCE = 1e-5  # of float32 log-probabilities
_NOISE = 4  # times what the model itself differs by, alone and in a batch, but at most
_MOST = 1000  # times the tolerance
_WINDOW = 4  # of sliding attention during the check, so that short texts feel it
_MODEL_FAILS = (
    ArithmeticError, AttributeError, ExpertmixError, LookupError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip


@contextmanager
def open_pathways(
    model: nn.Module | Routed,
    *,
    layers: Layers = "last 5",
    decisions: int = 1,
    scored: bool = False,
    shift: bool = False,
    progress: Progress = quiet,
) -> Iterator[Pathways]:
    """Open a model for pathways; it is at rest meanwhile, and as it was afterwards.

    Args:
        model: A MoE of transformers, or a model with routed adapters (`compose`).
        layers: The critical ones: `last N`, `all`, a pattern of site names, or a sequence of layer
            numbers and patterns.
        decisions: How many tokens of a prompt's end are decision tokens.
        scored: Whether the options' tokens are decision tokens too.
        shift: Whether pathways of mode `add` will come.
        progress: Told of the check, and of a notice.

    Yields:
        The pathways; their `notice` says why they are not `exact`, where they are not.

    Raises:
        NoSitesError: A dense model.
        UnsupportedModelError: A model that routes in a way that no binding fits.
        UnknownSiteError: A pattern or a layer number names no routed module.
        ConfigError: Nothing is named, sites of unlike experts, no decision token, or logits are to
            be shifted where a chain keeps a decision.
        UnsupportedRuntimeError: The model is open already, or is being recorded.
    """
    if decisions < 1:
        raise ConfigError(f"decisions={decisions}: a prompt's last token decides at least")
    routed = bind(model)
    sites = critical_sites(tuple(routed.sites), layers)
    whole = Whole(routed, sites, decisions=decisions, scored=scored, shift=shift)
    suffix = _suffix(whole, progress)
    if whole.notice is not None:
        progress(whole.notice, 1, 1)
    chosen = whole if suffix is None else suffix
    with chosen.running():
        yield chosen


def _suffix(whole: Whole, progress: Progress) -> Suffix | None:
    """The exact suffix, where it is; else `whole` gets the reason as its notice."""
    routed = whole.routed
    if not isinstance(routed, TransformersMoE):
        whole.notice = _notice("adapters may be routed by more than their own layer")
        return None
    stage = "checking the exact suffix against full passes"
    progress(stage, 0, 1)
    try:
        blocks = [block for block in routed.blocks if block.info in whole.sites]
        suffix = Suffix(
            routed, blocks, decisions=whole.decisions, scored=whole.scored, shift=whole.shift
        )
    except UnsupportedModelError as reason:
        whole.notice = _notice(str(reason))
        return None
    problem = _difference(suffix, whole)
    if problem is not None and suffix.split:  # an attention that wants one context
        suffix.split = False
        problem = _difference(suffix, whole)
    progress(stage, 1, 1)
    if problem is not None:
        whole.notice = _notice(problem)
        return None
    return suffix


def _notice(reason: str) -> str:
    return (
        f"the exact suffix does not fit this model, and every step is a full pass: {reason}. "
        f"Results are the same, they take longer."
    )


def _difference(suffix: Suffix, whole: Whole) -> str | None:
    """What is wrong with the suffix, or None."""
    config = suffix.stack.owner.config
    questions = _questions(config.vocab_size, whole.decisions)
    with _short_window(config), torch.no_grad():
        with whole.running():
            wanted = _logprobs(whole, questions)
        try:
            with suffix.running():
                got = _logprobs(suffix, questions)
        except _MODEL_FAILS as failure:  # code of any model, run in a way of ours
            return str(failure).strip().partition("\n")[0] or type(failure).__name__
        error, limit = _error(got, wanted), _tolerance(suffix.lm)
        if limit < error < _MOST * limit:  # perhaps it is rounding
            with whole.running():
                limit = max(limit, _NOISE * _noise(whole, questions, wanted))
    if error <= limit:
        return None
    return f"log-probabilities differ by {error:.1e} where {limit:.1e} is rounding"


def _noise(whole: Whole, questions: Sequence[Question], together: list[Tensor]) -> float:
    """By how much full passes differ from full passes: each question alone, and all together."""
    alone = [_logprobs(whole, [one], row) for row, one in enumerate(questions)]
    count = len(questions)
    return max(
        _error([one], [together[number * count + row]])
        for row, ways in enumerate(alone)
        for number, one in enumerate(ways)
    )


def _tolerance(lm: nn.Module) -> float:
    eps = torch.finfo(next(lm.parameters()).dtype).eps
    return max(_TOLERANCE, eps / 2)


def _questions(words: int, decisions: int) -> list[Question]:
    """Made-up ones: prompts and options of several lengths, down to one token."""
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, words, (count,), generator=generator).tolist())

    return [
        Question(ids(8 + decisions), (ids(2), ids(4))),
        Question(ids(1), (ids(1), ids(2), ids(2))),
    ]


def _logprobs(
    pathways: Suffix | Whole, questions: Sequence[Question], row: int | None = None
) -> list[Tensor]:
    """Way by way to read them, question by question: without pathways and with random ones."""
    readings = pathways.read(questions)
    batch: Any = pathways.batch(questions, [reading.state for reading in readings])
    found = [reading.logprobs for reading in readings]
    rows = slice(None) if row is None else slice(row, row + 1)
    plain = [None] if pathways.exact else []  # of full passes, a reading is just that
    for pathway in (*plain, *_random(pathways, rows)):
        found += [
            one[: len(question.options), : max(map(len, question.options))].cpu()
            for one, question in zip(pathways.score(batch, pathway), questions, strict=True)
        ]
    if not pathways.exact:
        found = found[: len(questions)] + found
    return found


def _random(pathways: Suffix | Whole, rows: slice) -> list[Pathway]:
    info, generator = pathways.sites[0], torch.Generator().manual_seed(1)
    shape = (2, pathways.decisions, len(pathways.sites))
    values = torch.randn(*shape, info.num_experts, generator=generator)[rows]
    mass = (torch.rand(shape, generator=generator) + 0.5)[rows]
    modes: list[Mode] = ["set", "add"] if pathways.shift else ["set"]
    widths = sorted({info.top_k, info.num_experts})
    return [Pathway(values, mass, width, mode) for mode in modes for width in widths]


def _error(got: list[Tensor], wanted: list[Tensor]) -> float:
    """Largest difference; infinite where something is no number."""
    each = [float((one - other).abs().max()) for one, other in zip(got, wanted, strict=True)]
    return max(one if one == one else float("inf") for one in each)


@contextmanager
def _short_window(config: Any) -> Iterator[None]:
    """Narrow sliding attention for a while: a short text then shows whether masks are right."""
    window = vars(config).get("sliding_window")
    if not isinstance(window, int) or window <= _WINDOW:
        yield
        return
    config.sliding_window = _WINDOW
    try:
        yield
    finally:
        config.sliding_window = window
