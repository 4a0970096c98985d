"""Texts through a model, batch by batch: `run`, and the `Run` that it returns.

Base, MoE and every edited MoE take this one path, so that their losses can be compared.

Shape legend: B rows of a batch, S columns, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expertmix.bindings.record import record
from expertmix.core.intervention import Intervention
from expertmix.core.progress import Progress, quiet
from expertmix.core.recording import Decoder
from expertmix.core.trace import Trace
from expertmix.errors import ConfigError
from expertmix.experts.chain_updates import (
    LayerUpdates,
    UpdateMeter,
    chains_in,
    update_norms,
)
from expertmix.study.corpus import Corpus, Sample

NOISE = 0.03
"""Nats per token: a smaller difference between runs over a few hundred tokens counts as none."""


@dataclass(frozen=True, slots=True)
class Keep:
    """What of a run's decisions to keep.

    Attributes:
        to: The trace file to stream to, or None to keep the trace in memory.
        logits: The gate's logits too.
        weights: Precision of weights in the file, `float32` or `float16`.
        tokenizer: Keep token strings; without it no text is kept.
    """

    to: Path | None = None
    logits: bool = False
    weights: str = "float32"
    tokenizer: Decoder | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """What came of one run over a corpus.

    Attributes:
        corpus: What was read.
        losses: Per sample in the corpus's order, mean next-token loss in nats, taken in float32;
            `nan` for a sample of one token.
        seconds: Wall-clock time.
        trace: The decisions, where they were asked for. Its samples are numbered in the order of
            the run, which is the corpus's own unless it was sorted by length.
        updates: What the iterations of chains gave, where decisions were kept and there are chains.
    """

    corpus: Corpus
    losses: tuple[float, ...]
    seconds: float
    trace: Trace | None = None
    updates: tuple[LayerUpdates, ...] = ()

    def loss(self, label: str | None = None) -> float:
        """Mean over predicted tokens, of one label or of all; `nan` where there are none."""
        total, tokens = 0.0, 0
        for sample, loss in zip(self.corpus.samples, self.losses, strict=True):
            if len(sample.ids) > 1 and label in (None, sample.label):
                total += loss * (len(sample.ids) - 1)
                tokens += len(sample.ids) - 1
        return total / tokens if tokens else math.nan

    def by_label(self) -> dict[str, float]:
        """Mean loss of each label."""
        return {label: self.loss(label) for label in self.corpus.labels}


def run(
    model: Any,
    corpus: Corpus,
    *edits: Intervention,
    keep: Keep | None = None,
    batch_size: int = 8,
    by_length: bool = False,
    progress: Progress = quiet,
    stage: str = "running",
) -> Run:
    """Read a corpus once, without gradients, padded on the right.

    Args:
        model: A causal LM of transformers; a dense one too, if nothing is edited or kept.
        corpus: What to read.
        edits: Interventions, in order.
        keep: Keep the decisions.
        batch_size: Samples per batch.
        by_length: Sort samples by length, which saves padding.
        progress: Told the samples that are done.
        stage: What to call this run there.

    Raises:
        ConfigError: A batch size below one.
        ExpertmixError: Whatever `em.record` finds wrong before the first batch.
    """
    order = _order(corpus, by_length)
    losses = [math.nan] * len(corpus)
    start = time.perf_counter()
    progress(stage, 0, len(corpus))
    labels = [corpus.samples[number].label for number in order]
    with _recording(model, edits, keep, labels) as trace, _measuring(model, keep) as meter:
        done = 0
        for numbers in batches(order, batch_size):
            found = sample_losses(model, [corpus.samples[number] for number in numbers])
            for number, loss in zip(numbers, found, strict=True):
                losses[number] = loss
            done += len(numbers)
            progress(stage, done, len(corpus))
    updates = () if meter is None else meter.layers
    return Run(corpus, tuple(losses), time.perf_counter() - start, trace, updates)


def _order(corpus: Corpus, by_length: bool) -> list[int]:
    numbers = list(range(len(corpus)))
    return sorted(numbers, key=lambda n: -len(corpus.samples[n].ids)) if by_length else numbers


def batches(order: list[int], size: int) -> Iterator[list[int]]:
    """An order in parts of a size.

    Raises:
        ConfigError: A size below one.
    """
    if size < 1:
        raise ConfigError(f"batch_size must be at least 1, not {size}")
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _recording(
    model: Any, edits: tuple[Intervention, ...], keep: Keep | None, labels: Sequence[str | None]
) -> AbstractContextManager[Trace | None]:
    if keep is None and not edits:
        return nullcontext()
    keep = keep or Keep()
    return record(
        model,
        *edits,
        to=keep.to,
        logits=keep.logits,
        weights=keep.weights,
        labels=[label for label in labels if label is not None] or None,
        tokenizer=keep.tokenizer,
    )


def _measuring(model: Any, keep: Keep | None) -> AbstractContextManager[UpdateMeter | None]:
    if keep is None or not chains_in(model):
        return nullcontext()
    return update_norms(model)


@torch.inference_mode()
def sample_losses(model: Any, samples: list[Sample]) -> list[float]:
    """Mean loss of each sample, read as one batch padded on the right."""
    ids_BS, real_BS = _padded(samples, next(model.parameters()).device)
    logits_BSV = model(input_ids=ids_BS, attention_mask=real_BS, use_cache=False).logits
    return [_loss(row_SV, s) for row_SV, s in zip(logits_BSV, samples, strict=True)]


def _padded(samples: list[Sample], device: torch.device) -> tuple[Tensor, Tensor]:
    """(B, S) ids, 0 where padded, and (B, S) int64 mask."""
    width = max(len(sample.ids) for sample in samples)
    ids = [[*sample.ids, *[0] * (width - len(sample.ids))] for sample in samples]
    real = [[1] * len(sample.ids) + [0] * (width - len(sample.ids)) for sample in samples]
    return torch.tensor(ids, device=device), torch.tensor(real, device=device)


def _loss(logits_SV: Tensor, sample: Sample) -> float:
    """Row by row, so that only one row is ever held in float32."""
    if len(sample.ids) < 2:
        return math.nan
    target_S = torch.tensor(sample.ids[1:], device=logits_SV.device)
    return torch.nn.functional.cross_entropy(logits_SV[: len(target_S)].float(), target_S).item()
