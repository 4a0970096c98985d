"""Building a reference set: one plain pass over samples, in parts that survive a killed run.

Samples are read in the order of their length, which saves padding, and kept in their own order.

Legend: N samples, B of a batch, H embedding width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from expertmix.core.pathway import Pathways, Reading
from expertmix.core.progress import Progress
from expertmix.errors import ConfigError, ModelError, OutputError
from expertmix.optimize import reference_folder
from expertmix.optimize.embedding import (
    Embedding,
    check_embeddings,
    embed,
    embedding_name,
    label,
)
from expertmix.optimize.reference_folder import PART, PLAN, Entry
from expertmix.optimize.reference_meta import ReferenceMeta, sample_to_dict
from expertmix.optimize.samples import Sample, scores
from expertmix.optimize.start import start
from expertmix.optimize.store import make_folder, read_json, write_json


@dataclass(frozen=True, eq=False, slots=True)
class Build:
    """One build: what is read, in which parts."""

    pathways: Pathways
    samples: Sequence[Sample]
    embedding: Embedding
    batch_size: int
    meta: ReferenceMeta
    parts: Sequence[Sequence[int]]

    def digest(self) -> str:
        """Of all that decides what the parts hold (not of a function that embeds)."""
        hashed = hashlib.sha256()
        about = [self.meta.to_dict(), self.batch_size, self.parts]
        hashed.update(json.dumps([about, *map(sample_to_dict, self.samples)]).encode())
        if isinstance(self.embedding, Tensor):
            hashed.update(self.embedding.detach().double().cpu().contiguous().numpy().tobytes())
        return hashed.hexdigest()

    def read(self, progress: Progress) -> tuple[ReferenceMeta, list[Entry]]:
        """Read all of it into memory.

        Raises:
            ConfigError: No successes.
            ModelError: Log-probabilities or embeddings that are not finite.
        """
        parts = [self.part(number, progress) for number in range(len(self.parts))]
        entries = sorted((one for part in parts for one in part), key=lambda one: one.number)
        return _finished(self, len(entries)), entries

    def stream(self, to: Path, progress: Progress) -> None:
        """Read it into a folder, or what is not in it yet.

        Raises:
            ConfigError: No successes, or a folder with another build.
            ModelError: Log-probabilities or embeddings that are not finite.
            OutputError: The folder cannot be written.
        """
        digest = self.digest()
        if _complete(to, digest):
            return
        count = sum(_streamed(self, number, to, progress) for number in range(len(self.parts)))
        reference_folder.finish(to, _finished(self, count), len(self.parts), digest)

    def part(self, number: int, progress: Progress) -> list[Entry]:
        """Read the samples of a part; its successes."""
        entries: list[Entry] = []
        part = self.parts[number]
        done = sum(len(other) for other in self.parts[:number])
        for at in range(0, len(part), self.batch_size):
            batch = part[at : at + self.batch_size]
            entries += self._batch(batch)
            progress("reading references", done + at + len(batch), len(self.samples))
        return entries

    def _batch(self, numbers: Sequence[int]) -> Iterator[Entry]:
        readings = self.pathways.read([self.samples[number].question for number in numbers])
        kept = [
            (number, reading)
            for number, reading in zip(numbers, readings, strict=True)
            if succeeded(self.samples[number], reading, number)
        ]
        if not kept:
            return
        order, good = zip(*kept, strict=True)
        samples = [self.samples[number] for number in order]
        chosen = self.embedding
        if isinstance(chosen, Tensor):
            chosen = chosen[torch.tensor(order)]
        embeddings = embed(chosen, samples, good)
        check_embeddings(embeddings, samples, self.meta.embedding)
        values, mass = start(good, self.meta.sites, decisions=self.meta.decisions)
        for row, (number, reading) in enumerate(kept):
            tensors = {
                "embedding": embeddings[row], "start": values[row].cpu(), "mass": mass[row].cpu(),
                "logprobs": reading.logprobs.float().cpu(),
            }  # fmt: skip
            state = reading.state if self.meta.states else None
            yield Entry(number, samples[row], tensors, state)


def succeeded(sample: Sample, reading: Reading, number: int = 0) -> bool:
    """Whether the model's answer to a sample is right: the first option of the highest score.

    Raises:
        ModelError: A log-probability is not finite.
    """
    if not bool(reading.logprobs.isfinite().all()):
        raise ModelError(
            f"sample {label(sample, number)}: the model's log-probabilities are not finite. Use "
            f"float32 or bfloat16, or leave the sample out"
        )
    return int(scores(reading.logprobs[None], [sample])[0].argmax()) == sample.gold


def make_plan(
    pathways: Pathways,
    samples: Sequence[Sample],
    embedding: Embedding,
    states: bool,
    batch_size: int,
) -> Build:
    """Decide what is read in which part; see `ReferenceSet.build`.

    Raises:
        ConfigError: No samples, one without `gold`, or vectors that do not fit.
    """
    if not samples:
        raise ConfigError("no samples to build a reference set from: give solved samples")
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size}: it must be at least 1")
    for number, sample in enumerate(samples):
        if sample.gold is None:
            raise ConfigError(
                f"sample {label(sample, number)} has no right option (gold): a reference set is "
                f"made of solved samples"
            )
    name = embedding_name(embedding)
    if isinstance(embedding, Tensor) and (embedding.dim() != 2 or len(embedding) != len(samples)):
        raise ConfigError(
            f"embeddings of {len(samples)} samples must be ({len(samples)}, width), "
            f"not {tuple(embedding.shape)}"
        )
    order = sorted(range(len(samples)), key=lambda number: _length(samples[number]))
    size = max(1, PART // batch_size) * batch_size
    parts = [order[at : at + size] for at in range(0, len(order), size)]
    meta = ReferenceMeta(
        pathways.fingerprint(), tuple(pathways.sites), pathways.decisions, pathways.exact, name,
        states,
    )  # fmt: skip
    return Build(pathways, samples, embedding, batch_size, meta, parts)


def _length(sample: Sample) -> tuple[int, int]:
    options = sample.question.options
    return len(sample.question.prompt), sum(map(len, options))


def _complete(to: Path, digest: str) -> bool:
    """Prepare the folder; whether the set in it is complete."""
    known = manifest = reference_folder.read_manifest(to)
    if known is None and (to / PLAN).exists():
        known = read_json(to / PLAN)
    if known is not None and (not isinstance(known, dict) or known.get("digest") != digest):
        raise ConfigError(
            f"{to} holds another reference set (other samples, model or settings): choose another "
            f"folder, or remove it first"
        )
    if known is None:
        if to.is_file() or (to.is_dir() and any(to.glob("[!.]*"))):
            raise OutputError(f"{to} exists already: choose another folder, or remove it first")
        make_folder(to)
        write_json(to / PLAN, {"digest": digest})
    return manifest is not None


def _streamed(plan: Build, number: int, to: Path, progress: Progress) -> int:
    """Read and write a part, if that was not done before; how many successes it has."""
    path = reference_folder.part_path(to, number)
    if path.exists():
        done = sum(len(part) for part in plan.parts[: number + 1])
        progress("reading references", done, len(plan.samples))
        return reference_folder.count(path)
    entries = plan.part(number, progress)
    reference_folder.write_part(to, number, entries)
    return len(entries)


def _finished(plan: Build, count: int) -> ReferenceMeta:
    tried = len(plan.samples)
    if not count:
        raise ConfigError(
            f"the model answered none of {tried} samples right (accuracy 0 %), and only successes "
            f"are references. Give easier or more samples, or check that their right options and "
            f"the way in which options are written are what the model expects"
        )
    return replace(plan.meta, tried=tried, succeeded=count)
