"""What was recorded: `Trace`, an ordered map from site to decision.

A trace is a list of chunks, one per pass through the model (in memory) or per row group (in a
file), and reads both the same way. It does not know how it was filled (`recording`) nor what its
file looks like (`parquet`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from expertmix.core import decision as decisions
from expertmix.core import tokens as token_lists
from expertmix.core.decision import Decision
from expertmix.core.site import Site, SiteInfo, match
from expertmix.core.tokens import Tokens
from expertmix.errors import TraceError, UnknownSiteError

SCHEMA_VERSION = 1

_EMPTY = (
    "the trace is empty: run the model inside the record block (a function that was compiled "
    "around the model before the block runs no hooks)"
)


@dataclass(frozen=True)
class TraceMeta:
    """What a trace says of its origin.

    Attributes:
        fingerprint: Hash of the model's structure and weights; `Replay` checks it.
        model: Name or path of the model.
        sites: The recorded sites, in the model's order.
        interventions: What was applied while recording, as JSON-ready dicts.
        settings: Anything else worth keeping: dtype, experts implementation, tokenizer.
        versions: Package versions.
        created: UTC time, ISO 8601.
        schema: Version of the file schema.
    """

    fingerprint: str
    model: str
    sites: tuple[SiteInfo, ...]
    interventions: tuple[dict[str, Any], ...] = ()
    settings: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    schema: int = SCHEMA_VERSION


@dataclass(frozen=True)
class Chunk:
    """Tokens and their decisions, for a part of a run.

    Attributes:
        tokens: n tokens.
        decisions: For each site, the decision for these n tokens.
        labels: Names of the samples by sample number (a domain, say), where given.
        text: n token strings, only where they were asked for.
    """

    tokens: Tokens
    decisions: Mapping[Site, Decision]
    labels: Mapping[int, str] = field(default_factory=dict)
    text: tuple[str, ...] | None = None


class Store(Protocol):
    """Where a trace keeps its chunks: in memory, or in a file read lazily."""

    path: Path | None

    def chunks(self, sites: tuple[Site, ...]) -> Iterator[Chunk]:
        """The chunks in order, with decisions for these sites only (none: the tokens alone)."""


class Memory:
    """A store that holds its chunks."""

    path: Path | None = None

    def __init__(self, chunks: list[Chunk] | None = None) -> None:
        self.held = [] if chunks is None else chunks

    def chunks(self, sites: tuple[Site, ...]) -> Iterator[Chunk]:
        """The chunks as they were recorded, with decisions for these sites only."""
        for chunk in self.held:
            found = {site: made for site, made in chunk.decisions.items() if site in sites}
            yield replace(chunk, decisions=found)


class Trace:
    """Recorded decisions: `trace[site]` is the `Decision` of all tokens at a site.

    A site may be named by any pattern that matches it alone. Iterating gives the sites; the length
    is the number of tokens.

    Example:
        >>> with em.record(model) as trace:
        ...     model(**inputs)
        >>> trace["model.layers.7.mlp"].indices  # (tokens, top_k)
    """

    def __init__(self, meta: TraceMeta, store: Store) -> None:
        self.meta = meta
        self._store = store

    @property
    def path(self) -> Path | None:
        """The file it lives in, or None while it is in memory."""
        return self._store.path

    @property
    def sites(self) -> tuple[Site, ...]:
        """The recorded sites, in the model's order."""
        return tuple(info.site for info in self.meta.sites)

    def info(self, site: Site) -> SiteInfo:
        """What is known of a site."""
        known = {info.site: info for info in self.meta.sites}
        return known[self._one(site)]

    def chunks(self, pattern: str = "*") -> Iterator[Chunk]:
        """Part by part, with flat memory for a trace in a file."""
        return self._store.chunks(match(pattern, self.sites))

    @property
    def tokens(self) -> Tokens:
        """All tokens.

        Raises:
            TraceError: Nothing has been recorded yet.
        """
        parts = [chunk.tokens for chunk in self._store.chunks(())]
        if not parts:
            raise TraceError(_EMPTY)
        return token_lists.concatenate(parts)

    @property
    def labels(self) -> dict[int, str]:
        """Labels by sample number, where they were given."""
        return {key: name for part in self._store.chunks(()) for key, name in part.labels.items()}

    @property
    def text(self) -> tuple[str, ...] | None:
        """Token strings, or None where they were not asked for."""
        parts = [chunk.text for chunk in self._store.chunks(())]
        kept = [part for part in parts if part is not None]
        return tuple(token for part in kept for token in part) if kept == parts else None

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __contains__(self, site: object) -> bool:
        return (Site.parse(site) if isinstance(site, str) else site) in self.sites

    def _one(self, site: Site | str) -> Site:
        exact = Site.parse(site) if isinstance(site, str) else site
        found = (exact,) if exact in self.sites else match(str(site), self.sites)
        if len(found) > 1:
            raise UnknownSiteError(
                f"{str(site)!r} matches {len(found)} sites of the trace; name one, such as "
                f"trace[{str(found[0])!r}]"
            )
        return found[0]

    def __getitem__(self, site: Site | str) -> Decision:
        wanted = self._one(site)
        parts = [_decision(chunk, self.info(wanted)) for chunk in self._store.chunks((wanted,))]
        if not parts:
            raise TraceError(_EMPTY)
        if len(parts) > 1 and any(part.weights.requires_grad for part in parts):
            raise TraceError(
                f"recorded with grad=True over {len(parts)} passes: joined weights are not the "
                f"tensors that the model used. Use one record block per pass, or trace.chunks()."
            )
        return decisions.concatenate(parts)

    def __len__(self) -> int:
        return sum(len(chunk.tokens) for chunk in self._store.chunks(()))

    def __repr__(self) -> str:
        try:
            size = f"{len(self)} tokens"
        except TraceError:
            size = "not readable yet"
        return f"Trace({size}, {len(self.sites)} sites, model={self.meta.model!r})"

    def save(
        self,
        path: str | Path,
        *,
        weights: str = "float32",
        token_ids: bool = True,
        text: bool = True,
        overwrite: bool = False,
    ) -> Path:
        """Write one Parquet file, atomically.

        Args:
            path: The file.
            weights: `float32` (replays bit for bit) or `float16` (half the size).
            token_ids: Keep ids; whoever has the tokenizer can read the prompt from them.
            text: Keep token strings, where they were recorded.
            overwrite: Replace a file that is there.

        Raises:
            OutputError: The file cannot be written, or is there already.
        """
        from expertmix.core.parquet import TraceWriter

        with TraceWriter(
            path, self.meta, weights=weights, token_ids=token_ids, text=text, overwrite=overwrite
        ) as writer:
            for chunk in self.chunks():
                writer.write(chunk)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Open a trace file; decisions are read when they are asked for.

        Raises:
            CorruptTraceError: Truncated, or no trace.
            TraceError: Written by a newer version.
        """
        from expertmix.core.parquet import ParquetStore, read_meta

        meta = read_meta(path)
        return cls(meta, ParquetStore(Path(path), meta))


def _decision(chunk: Chunk, info: SiteInfo) -> Decision:
    """What was decided at a site; nothing where it did not run in this chunk."""
    found = chunk.decisions.get(info.site)
    return decisions.none(len(chunk.tokens), info) if found is None else found
