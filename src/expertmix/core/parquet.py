"""The trace file: Parquet, written row group by row group, read the same way.

`layout` says which columns there are. A file is written under a temporary name in the folder where
it will live and takes its own name only when it is complete, so what has the name is whole. Weights
and logits are float32 columns: exact for float32, bfloat16 and float16 models (float64 is rounded).
With `weights="float16"` the values are rounded to what float16 can hold and still stored as float32
(the zero bits compress away, and DuckDB cannot read a split float16 column): then above 65504 is
infinity, below 3e-8 is 0, and a replay is no longer bit for bit.

Encodings were chosen by size at 16 sites, E = 64, K = 8 (bytes per token, zstd): expert numbers 96
with BYTE_STREAM_SPLIT, 96 with a dictionary, 151 plain, 117 delta; float32 weights 405, 532, 456.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from expertmix.core.layout import KEY, Layout, described, first_layout
from expertmix.core.partial import PartialFile
from expertmix.core.rows import ROW_GROUP, Rows, chunk_of
from expertmix.core.site import Site
from expertmix.core.trace import Chunk, TraceMeta
from expertmix.errors import CorruptTraceError, OutputError, TraceError

COMPRESSION_LEVEL = 1  # of zstd: split byte streams gain under 1 % from more


class TraceWriter:
    """Writes chunks to a trace file; a context manager.

    The file appears under its name when the block ends well. After an exception or a kill there is
    none, and an older file of that name is untouched.

    Every column is as wide as the widest decision. When a later chunk has more experts per token
    than any before it (`Reweight` can do that), or the first logits, labels or text, what was
    written so far is copied once into wider columns.

    Args:
        path: The file; missing parent folders are made.
        meta: What the trace says of its origin; other sites than these are not written.
        weights: `float32`, or `float16` to round weights and logits to half precision.
        token_ids: Keep token ids.
        text: Keep token strings, where a chunk has them.
        overwrite: Replace a file that is there.

    Raises:
        ConfigError: No such precision.
        TraceError: More experts than int16 can number.
        OutputError: On entering: no permission, a file or folder in the way. Later: the disk is
            full.
    """

    def __init__(
        self,
        path: str | Path,
        meta: TraceMeta,
        *,
        weights: str = "float32",
        token_ids: bool = True,
        text: bool = True,
        overwrite: bool = False,
    ) -> None:
        self.path = Path(path)
        self._meta = meta
        self._text = text
        self._overwrite = overwrite
        self._layout = first_layout(meta.sites, weights, token_ids=token_ids)
        self._rows = Rows(self._layout)
        self._part: _Part | None = None

    def __enter__(self) -> TraceWriter:
        self._check_free()
        self._part = _Part(self.path)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._open_part().discard()
            self._part = None

    def write(self, chunk: Chunk) -> None:
        """Append tokens and their decisions.

        Raises:
            OutputError: The disk is full; the file is given up.
            TraceError: The chunk does not fit together, or the writer is not open.
        """
        _check(chunk)
        self._open_part()
        try:
            self._adopt(self._layout.fitted(chunk, text=self._text))
            self._fill(chunk)
        except BaseException:  # a caller may go on all the same: without this chunk, no file
            self._open_part().discard()
            raise

    def _adopt(self, layout: Layout) -> None:
        if layout is self._layout:
            return
        pending, self._layout = self._rows.grown(layout), layout
        if self._open_part().started:
            self._copy(self._open_part())
        self._rows = pending

    def _copy(self, old: _Part) -> None:
        try:
            old.seal()
            self._part = _Part(self.path)
            self._rows = Rows(self._layout)
            for chunk in ParquetStore(old.path, self._meta).chunks(tuple(self._layout.shapes)):
                self._fill(chunk)
        finally:
            old.discard()

    def _fill(self, chunk: Chunk) -> None:
        done = 0
        while done < len(chunk.tokens):
            done += self._rows.take(chunk, done)
            if self._rows.used == ROW_GROUP:
                self._flush()

    def _flush(self) -> None:
        part = self._open_part()
        part.start(self._layout, self._meta)
        if self._rows.used:
            part.append(self._rows)
            self._rows = Rows(self._layout)

    def _finish(self) -> None:
        self._flush()
        part = self._open_part()
        part.seal()
        try:
            self._check_free()
        except OutputError as problem:
            raise OutputError(f"{problem}. The recording is whole in {part.keep()}") from None
        part.publish()

    def _open_part(self) -> _Part:
        if self._part is None:
            raise TraceError(f"the writer of {self.path} is not open: use it in a with block")
        return self._part

    def _check_free(self) -> None:
        if self.path.is_dir():
            raise OutputError(f"{self.path} is a folder; name a file in it")
        if not self._overwrite and self.path.exists():
            raise OutputError(f"{self.path} exists; choose another name, or pass overwrite=True")


class _Part:
    """A Parquet file under its temporary name."""

    def __init__(self, target: Path) -> None:
        self._partial = PartialFile(target)
        self._writer: Any = None
        self.path = self._partial.path
        self.publish = self._partial.publish
        self.keep = self._partial.keep

    @property
    def started(self) -> bool:
        """Whether the columns are fixed."""
        return self._writer is not None

    def start(self, layout: Layout, meta: TraceMeta) -> None:
        """Fix the columns, the first time."""
        if self.started:
            return
        with self._partial.writing():
            self._writer = pq.ParquetWriter(
                self._partial.file,
                layout.schema(meta),
                compression="zstd",
                compression_level=COMPRESSION_LEVEL,
                use_dictionary=sorted({"token_id", "label"} & set(layout.token_columns)),
                column_encoding=layout.encodings(),
                write_statistics=["sample", "position"],
                write_page_checksum=True,
            )

    def append(self, rows: Rows) -> None:
        """Write one row group."""
        with self._partial.writing():
            self._writer.write_table(rows.table(self._writer.schema), row_group_size=ROW_GROUP)

    def seal(self) -> None:
        """Write the footer and wait until all is on the disk."""
        with self._partial.writing():
            self._writer.close()
        self._partial.seal()

    def discard(self) -> None:
        """Remove the file; does nothing once it is published or kept."""
        if self._writer is not None:
            self._writer.is_open = False  # or its finalizer would write to the closed file
        self._partial.discard()


class ParquetStore:
    """Reads a trace file lazily, one row group at a time.

    The file need not be there yet: it is opened when chunks are asked for.

    Attributes:
        path: The file.
    """

    path: Path | None

    def __init__(self, path: Path, meta: TraceMeta) -> None:
        self.path = path
        self._path = path
        self._meta = meta

    def chunks(self, sites: tuple[Site, ...]) -> Iterator[Chunk]:
        """The chunks in order, with decisions for these sites only (none: the tokens alone).

        A decision is as wide as the widest of its site: indices are -1 and weights 0 where a token
        had fewer experts, or none because the site did not run. Where a row group has logits for
        some tokens only, those of the others are NaN.

        Raises:
            TraceError: There is no file, it is still being written, or it was replaced by another.
            CorruptTraceError: The file is damaged.
        """
        with _opened(self._path) as (file, meta, layout):
            if (meta.created, meta.sites) != (self._meta.created, self._meta.sites):
                raise TraceError(f"{self._path} was replaced by another trace; load it again")
            groups = layout.groups_of(sites)
            columns = [*layout.token_columns, *(name for group in groups for name in group.columns)]
            for number in range(file.num_row_groups):
                with _input_errors(self._path):
                    table = file.read_row_group(number, columns=columns)
                    chunk = chunk_of(table, layout, sites)
                yield chunk


def read_meta(path: str | Path) -> TraceMeta:
    """What a trace file says of its origin; decisions are not read.

    Raises:
        TraceError: There is no file, or a newer version wrote it.
        CorruptTraceError: It is truncated, or not a trace.
    """
    with _opened(Path(path)) as (_, meta, _layout):
        return meta


def _check(chunk: Chunk) -> None:
    tokens = len(chunk.tokens)
    for site, decision in chunk.decisions.items():
        if len(decision) != tokens:
            raise TraceError(f"{len(decision)} decisions at {site} for {tokens} tokens")
    if chunk.text is not None and len(chunk.text) != tokens:
        raise TraceError(f"{len(chunk.text)} token strings for {tokens} tokens")


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, TraceMeta, Layout]]:
    if not path.is_file():
        raise TraceError(_missing(path))
    with _input_errors(path):
        file = pq.ParquetFile(path, page_checksum_verification=True)
    with file:
        with _input_errors(path):
            raw = (file.schema_arrow.metadata or {}).get(KEY)
            if raw is None:
                raise ValueError("it has no expertmix metadata")
            meta, layout = described(raw)
        yield file, meta, layout


def _missing(path: Path) -> str:
    if path.is_dir():
        return f"{path} is a folder, not a trace file"
    if any(path.parent.glob(f".{glob.escape(path.name)}.*.partial")):
        return f"{path} is still being written: read the trace after the record block has ended"
    return (
        f"there is no trace file {path}. A run that failed or was stopped keeps none; while one is "
        f"being recorded, read it after the block has ended"
    )


@contextmanager
def _input_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except PermissionError as problem:
        raise TraceError(f"no permission to read {path}") from problem
    except TraceError as problem:
        raise TraceError(f"{path}: {problem}") from problem
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as problem:
        raise CorruptTraceError(
            f"{path} is damaged, cut short, or no expertmix trace ({problem}). Use a copy, or "
            f"record it again."
        ) from problem
