"""`record`: a block in which decisions are edited and kept.

It is given a `Routed`; `expertmix.record` finds that in a model. A `Recording` does the work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from expertmix.core.intervention import Intervention
from expertmix.core.protocols import Routed
from expertmix.core.recording import Decoder, Recording, single_edits
from expertmix.core.replay import Replay
from expertmix.core.site import match
from expertmix.core.trace import Chunk, Memory, Trace, TraceMeta
from expertmix.errors import FingerprintError, InterventionError


@contextmanager
def record(
    routed: Routed,
    *interventions: Intervention,
    sites: str = "*",
    logits: bool = False,
    grad: bool = False,
    to: str | Path | None = None,
    weights: str = "float32",
    token_ids: bool = True,
    overwrite: bool = False,
    labels: Sequence[str] | None = None,
    tokenizer: Decoder | None = None,
) -> Iterator[Trace]:
    """`expertmix.record`, which says what the arguments mean, for what is `Routed` already.

    Yields:
        The trace, which fills as the model runs.

    Raises:
        AddressError: A pattern or an expert number points at nothing.
        FingerprintError: A replayed trace belongs to another model.
    """
    infos = tuple(routed.sites)
    recorded = frozenset(match(sites, [info.site for info in infos]))
    fingerprint = routed.fingerprint()
    _check_replays(interventions, fingerprint)
    meta = TraceMeta(
        fingerprint=fingerprint,
        model=routed.name,
        sites=tuple(info for info in infos if info.site in recorded),
        interventions=tuple(_described(edit) for edit in interventions),
        settings=routed.settings | _tokenizer(tokenizer),
        versions=dict(_versions()),
    )
    open_store = _memory(meta)
    if to is not None:
        open_store = _file(meta, to, weights=weights, token_ids=token_ids, overwrite=overwrite)
    with open_store as (trace, sink):
        recording = Recording(
            infos, interventions, recorded=recorded, logits=logits, grad=grad, labels=labels,
            decoder=tokenizer, sink=sink,
        )  # fmt: skip
        with routed.attach(recording):
            yield trace


@contextmanager
def _memory(meta: TraceMeta) -> Iterator[tuple[Trace, Callable[[Chunk], None]]]:
    memory = Memory()
    yield Trace(meta, memory), memory.held.append


@contextmanager
def _file(
    meta: TraceMeta, path: str | Path, *, weights: str, token_ids: bool, overwrite: bool
) -> Iterator[tuple[Trace, Callable[[Chunk], None]]]:
    from expertmix.core.parquet import ParquetStore, TraceWriter

    writer = TraceWriter(path, meta, weights=weights, token_ids=token_ids, overwrite=overwrite)
    with writer:
        yield Trace(meta, ParquetStore(Path(path), meta)), writer.write


def _check_replays(interventions: Sequence[Intervention], fingerprint: str) -> None:
    for edit in single_edits(interventions):
        if not isinstance(edit, Replay) or edit.any_model:
            continue
        if edit.trace.meta.fingerprint != fingerprint:
            raise FingerprintError(
                f"the trace was recorded on {edit.trace.meta.model!r} "
                f"({edit.trace.meta.fingerprint[:12]}), this model is {fingerprint[:12]}: other "
                f"weights or another structure. Pass any_model=True to replay it all the same."
            )


def _described(edit: Intervention) -> dict[str, object]:
    try:
        return edit.to_dict()
    except InterventionError:
        return {"kind": edit.kind, "note": "not serializable: its trace was not saved"}


def _tokenizer(tokenizer: Decoder | None) -> dict[str, str]:
    """Name and class of what the token strings come from."""
    if tokenizer is None:
        return {}
    name = str(getattr(tokenizer, "name_or_path", "")).rstrip("/").rpartition("/")[2]
    return {"tokenizer": f"{name} ({type(tokenizer).__name__})".strip()}


@cache  # a block may be opened for every expert in turn
def _versions() -> dict[str, str]:
    found = {}
    for package in ("expertmix", "torch", "transformers", "peft"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
