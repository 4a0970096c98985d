"""Answers to prompts, with the adapters that made each token: `generate` and `Answer`.

A token is made by the pass that reads the token before it, so its adapters are those that were
chosen there: the last token of the prompt made the first of the answer. What a batch goes on with
after a row's end is no part of the answer and is left out of what is recorded.

Legend: B rows of a batch, S columns, n tokens of an answer, E adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from expertmix.attribute.modules import mean_weights, winners
from expertmix.bindings.record import record
from expertmix.core import decision as decisions
from expertmix.core import tokens as token_lists
from expertmix.core.progress import Progress, quiet
from expertmix.core.trace import Chunk, Trace, TraceMeta
from expertmix.errors import CheckpointError, ConfigError, ContextLengthError
from expertmix.experts.composed import Composed
from expertmix.study.contest import tell
from expertmix.study.corpus import Corpus, Sample
from expertmix.study.tracing import batches


@dataclass(frozen=True, slots=True)
class Decoding:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: Length of an answer at most.
        temperature: 0 takes the most likely token; above it tokens are drawn.
        seed: Of the drawing.

    Raises:
        ConfigError: A value that is not possible.
    """

    max_new_tokens: int = 40
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature must be 0 or more, and finite: {self.temperature}")

    def check(self, corpus: Corpus, context: int | None) -> None:
        """Refuse prompts that leave no room for an answer.

        Raises:
            ContextLengthError: Prompt and answer are longer than the model can read.
        """
        for sample in corpus.samples:
            length = len(sample.ids) + sample.cut
            if context is not None and length + self.max_new_tokens > context:
                raise ContextLengthError(
                    f"{sample.where}: a prompt of {length} tokens and an answer of "
                    f"{self.max_new_tokens} are more than the {context} that the model reads. "
                    f"Shorten the prompt or lower --max-new-tokens."
                )

    @property
    def arguments(self) -> dict[str, Any]:
        """Of `generate`; what a model's own generation config says of sampling does not count."""
        drawn = self.temperature > 0
        return {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": drawn,
            "temperature": self.temperature if drawn else None,
            "top_p": None,
            "top_k": None,
        }


@dataclass(frozen=True, eq=False, slots=True)
class Answer:
    """What a prompt was answered.

    Attributes:
        prompt: The prompt.
        ids: n token ids; the token that ended the answer is left out.
        text: Them as text.
        pieces: n token strings, as the vocabulary writes them.
        weights: (n, E) mean weight of each adapter over all sites, where the token was made.
        made: The decisions that made the n tokens, one row each; None where they were not kept.
    """

    prompt: Sample
    ids: tuple[int, ...]
    text: str
    pieces: tuple[str, ...]
    weights: Tensor
    made: Chunk | None

    @property
    def first(self) -> list[int | None]:
        """Per token the adapter with most weight; None where several tie, or none had any."""
        rows = winners(self.weights).tolist()
        return [row.index(1) if 1 in row else None for row in rows]

    @property
    def shares(self) -> Tensor:
        """(E,) share of each adapter in the weight of the answer; zero where there is none."""
        mass_E = self.weights.double().sum(0)
        return mass_E / mass_E.sum().clamp(min=torch.finfo(torch.float64).tiny)


Keep = Callable[[TraceMeta, Chunk], None]
"""Takes what was recorded, batch by batch."""


def generate(
    composed: Composed,
    corpus: Corpus,
    tokenizer: Any,
    decoding: Decoding,
    *,
    told: Sequence[str] | None = None,
    keep: Keep | None = None,
    detail: Collection[int] = (),
    batch_size: int = 8,
    progress: Progress = quiet,
) -> tuple[Answer, ...]:
    """Answer every prompt, padded on the left, and record what was decided.

    Args:
        composed: The model.
        corpus: The prompts.
        tokenizer: Of the model.
        decoding: How tokens are chosen.
        told: For an oracle: an adapter's name for each prompt.
        keep: Given the decisions of each batch, padding left out.
        detail: Numbers of the answers that keep the decisions that made them.
        batch_size: Prompts per batch.
        progress: Told the prompts that are done.

    Raises:
        CheckpointError: An adapter is so large that weights overflow.
    """
    answers: list[Answer] = []
    progress("answering", 0, len(corpus))
    with _seeded(decoding.seed):
        for numbers in batches(list(range(len(corpus))), batch_size):
            tell(composed, told, numbers)
            samples = [corpus.samples[number] for number in numbers]
            with record(composed, tokenizer=tokenizer) as trace:
                made = _generate(composed.model, samples, tokenizer, decoding)
            whole = _whole(trace, samples, [len(ids) for ids in made], numbers[0])
            if keep is not None:
                keep(trace.meta, whole)
            answers += [
                _answer(one, number, ids, tokenizer, whole, keep=number in detail)
                for one, number, ids in zip(samples, numbers, made, strict=True)
            ]
            progress("answering", len(answers), len(corpus))
    return tuple(answers)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draw from a seed, and leave the generators as they were."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


@torch.inference_mode()
def _generate(
    model: Any, samples: Sequence[Sample], tokenizer: Any, decoding: Decoding
) -> list[tuple[int, ...]]:
    """New ids of each row, up to its end."""
    ends = _ends(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends, default=0)
    ids_BS, real_BS = _padded(samples, pad, next(model.parameters()).device)
    whole_BS = model.generate(
        input_ids=ids_BS,
        attention_mask=real_BS,
        pad_token_id=pad,
        eos_token_id=sorted(ends) or None,
        **decoding.arguments,
    )
    return [_until(row, ends) for row in whole_BS[:, ids_BS.shape[1] :].tolist()]


def _ends(model: Any, tokenizer: Any) -> set[int]:
    """Tokens that end an answer: those of the model, and the tokenizer's own."""
    own = model.generation_config.eos_token_id
    listed = own if isinstance(own, list) else [own]
    return {int(end) for end in (*listed, tokenizer.eos_token_id) if end is not None}


def _until(ids: list[int], ends: set[int]) -> tuple[int, ...]:
    stop = next((place for place, one in enumerate(ids) if one in ends), len(ids))
    return tuple(ids[:stop])


def _padded(samples: Sequence[Sample], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(B, S) ids with padding in front, and (B, S) int64 mask."""
    width = max(len(sample.ids) for sample in samples)
    ids = [[*[pad] * (width - len(sample.ids)), *sample.ids] for sample in samples]
    real = [[0] * (width - len(sample.ids)) + [1] * len(sample.ids) for sample in samples]
    return torch.tensor(ids, device=device), torch.tensor(real, device=device)


def _whole(trace: Trace, samples: Sequence[Sample], made: Sequence[int], first: int) -> Chunk:
    """All passes of a batch as one chunk, row by row; padding and what follows an end left out."""
    parts = list(trace.chunks())
    tokens = token_lists.concatenate([part.tokens for part in parts])
    ends_B = torch.tensor([len(one.ids) + n for one, n in zip(samples, made, strict=True)])
    kept_N = (tokens.real & (tokens.position < ends_B[tokens.sample])).nonzero().flatten()
    kept_N = kept_N[torch.argsort(tokens.sample[kept_N], stable=True)]
    text = [piece for part in parts for piece in part.text or ()]
    labels = {first + row: one.label for row, one in enumerate(samples) if one.label is not None}
    return Chunk(
        replace(tokens.rows(kept_N), sample=tokens.sample[kept_N] + first),
        {
            site: decisions.concatenate([part.decisions[site] for part in parts]).rows(kept_N)
            for site in parts[0].decisions
        },
        labels,
        tuple(text[row] for row in kept_N.tolist()),
    )


def _answer(
    prompt: Sample, number: int, ids: tuple[int, ...], tokenizer: Any, whole: Chunk, *, keep: bool
) -> Answer:
    pieces = tuple(tokenizer.convert_ids_to_tokens(list(ids)))
    made = _made(whole, number, len(prompt.ids), ids, pieces)
    weights_nE = mean_weights(made.decisions, made.decisions)
    assert weights_nE is not None, "a composed model has sites"
    if not bool(weights_nE.isfinite().all()):
        raise CheckpointError(
            f"{prompt.where}: the weights of the adapters are no longer numbers: one is far "
            f"too large for this type (`expertmix spectra` shows sizes). Leave it out, or try "
            f"--dtype float32."
        )
    text = tokenizer.decode(list(ids), skip_special_tokens=False)
    return Answer(prompt, ids, text, pieces, weights_nE, made if keep else None)


def _made(
    whole: Chunk, number: int, length: int, ids: tuple[int, ...], pieces: tuple[str, ...]
) -> Chunk:
    """The rows that made the tokens of one answer, under the names of these tokens."""
    tokens = whole.tokens
    start = length - 1
    wanted_N = (tokens.sample == number) & (tokens.position >= start)
    rows = wanted_N.nonzero().flatten()[: len(ids)]
    named = replace(
        tokens.rows(rows),
        position=tokens.position[rows] + 1,
        token_id=torch.tensor(ids, dtype=torch.int64),
    )
    label = whole.labels.get(number)
    labels = {} if label is None else {number: label}
    return Chunk(
        named, {site: one.rows(rows) for site, one in whole.decisions.items()}, labels, pieces
    )
