"""A reference set as a folder: numbered parts, and a manifest that is written last.

    manifest.json               what the set says of itself, and its parts; its existence means
                                that the set is complete
    plan.json                   which build the parts belong to, while one is under way
    part-00000.safetensors      embeddings, pathways, log-probabilities; samples in the header
    states-00000.safetensors    states of the same samples, where they are kept

A part counts once its `part-` file is there: it is written after its states. Nothing is ever
overwritten. Knows files; no model.

Legend: n samples of a part.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from expertmix.errors import ConfigError, OutputError
from expertmix.optimize.reference_meta import (
    ReferenceMeta,
    sample_from_dict,
    sample_to_dict,
)
from expertmix.optimize.samples import Sample
from expertmix.optimize.states import NoStates, State, States, StoredStates
from expertmix.optimize.store import Row, RowFile, make_folder, read_json, write_json, write_rows

MANIFEST = "manifest.json"
PLAN = "plan.json"
PART = 64  # samples that are read between two writes


@dataclass(frozen=True, eq=False, slots=True)
class Entry:
    """A reference in the making.

    Attributes:
        number: Among the samples that were tried.
        sample: The sample.
        row: `embedding` (H,), `start` (D, L, E), `mass` (D, L), `logprobs` (O, W).
        state: What is needed to read it again, if that is kept.
    """

    number: int
    sample: Sample
    row: Row
    state: State | None


@dataclass(frozen=True, eq=False, slots=True)
class Contents:
    """A folder, opened: references in the order of their numbers.

    Attributes:
        meta: What the set says of itself.
        samples: N.
        parts: Per name, N tensors.
        states: Where states come from.
    """

    meta: ReferenceMeta
    samples: list[Sample]
    parts: dict[str, list[Tensor]]
    states: States


def part_path(folder: Path, number: int) -> Path:
    """Of a part."""
    return folder / f"part-{number:05d}.safetensors"


def write_part(folder: Path, number: int, entries: Sequence[Entry]) -> None:
    """Write the entries of a part, states first.

    Raises:
        OutputError: It cannot be written.
    """
    states = [entry.state for entry in entries if entry.state is not None]
    if states:
        write_rows(folder / _states_name(number), states)
    notes = [{"number": entry.number, **sample_to_dict(entry.sample)} for entry in entries]
    write_rows(part_path(folder, number), [entry.row for entry in entries], notes)


def count(path: Path) -> int:
    """How many references a part holds."""
    return len(RowFile(path).notes)


def finish(folder: Path, meta: ReferenceMeta, parts: int, digest: str = "") -> None:
    """Write the manifest: the set is complete.

    Raises:
        OutputError: It cannot be written.
    """
    write_json(folder / MANIFEST, {"meta": meta.to_dict(), "parts": parts, "digest": digest})
    for path in folder.glob(".*.partial"):  # left by runs that were killed
        path.unlink(missing_ok=True)


def save(folder: Path, meta: ReferenceMeta, entries: Iterable[Entry]) -> None:
    """Write a whole set to a new folder.

    Raises:
        OutputError: Something is there already, or it cannot be written.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise OutputError(f"{folder} exists already: choose another folder, or remove it first")
    make_folder(folder)
    parts = 0
    for parts, part in enumerate(_batched(entries, PART), 1):
        write_part(folder, parts - 1, part)
    finish(folder, meta, parts)


def load(folder: Path) -> Contents:
    """Open a finished folder; states stay on the disk.

    Raises:
        ConfigError: No reference set, one that is not finished, or a part that cannot be read.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        unfinished = (folder / PLAN).exists()
        raise ConfigError(
            f"{folder} holds a reference set that is not finished: build it again with the same "
            f"arguments, which goes on where it stopped"
            if unfinished
            else f"{folder} holds no reference set: it has no {MANIFEST}"
        )
    meta = ReferenceMeta.from_dict(manifest.get("meta"), str(folder / MANIFEST))
    found = sorted(_entries(folder, int(manifest.get("parts", 0))), key=lambda one: one[0])
    if len(found) != meta.succeeded:
        raise ConfigError(
            f"{folder} has {len(found)} references, its manifest says {meta.succeeded}: build it "
            f"again"
        )
    names = ("embedding", "start", "mass", "logprobs")
    places = [place for _, _, _, place in found]
    return Contents(
        meta,
        [sample for _, sample, _, _ in found],
        {name: [row[name] for _, _, row, _ in found] for name in names},
        StoredStates(folder, places) if meta.states else NoStates(),
    )


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest, or None where there is none.

    Raises:
        ConfigError: It cannot be read.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    data = read_json(path)
    if not isinstance(data, dict):
        raise ConfigError(f"{path} is no manifest of a reference set")
    return data


def _entries(folder: Path, parts: int) -> Iterator[tuple[int, Sample, Row, tuple[str, int]]]:
    for part in range(parts):
        path = part_path(folder, part)
        file = RowFile(path)
        try:
            samples = [(int(note["number"]), sample_from_dict(note)) for note in file.notes]
            for at, ((number, sample), row) in enumerate(zip(samples, file.rows(), strict=True)):
                yield number, sample, row, (_states_name(part), at)
        except (KeyError, TypeError, ValueError) as problem:
            raise ConfigError(f"cannot read {path}: {problem}. Build it again") from problem


def _states_name(part: int) -> str:
    return f"states-{part:05d}.safetensors"


def _batched(entries: Iterable[Entry], size: int) -> Iterator[list[Entry]]:
    iterator = iter(entries)
    while part := list(islice(iterator, size)):
        yield part
