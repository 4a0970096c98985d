"""Laws of the trace file."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from expertmix.core import layout, partial
from expertmix.core.decision import Decision
from expertmix.core.parquet import ParquetStore, TraceWriter, read_meta
from expertmix.core.rows import ROW_GROUP
from expertmix.core.site import Site, SiteInfo
from expertmix.core.tokens import Tokens
from expertmix.core.trace import SCHEMA_VERSION, Chunk, Memory, Trace, TraceMeta
from expertmix.errors import ConfigError, CorruptTraceError, OutputError, TraceError

SHAPES = ((8, 2), (8, 2), (5, 3))


def infos(shapes: tuple[tuple[int, int], ...] = SHAPES) -> tuple[SiteInfo, ...]:
    return tuple(
        SiteInfo(Site(f"model.layers.{number // 2}.mlp", number % 2), experts, top_k)
        for number, (experts, top_k) in enumerate(shapes)
    )


def meta_of(sites: tuple[SiteInfo, ...] = infos()) -> TraceMeta:
    return TraceMeta(
        "abc", "a-model", sites, ({"kind": "ablate", "sites": "*", "experts": [1]},),
        {"dtype": "float32"}, {"torch": "2.13"},
    )  # fmt: skip


def decide(
    count: int, info: SiteInfo, *, logits: bool = False, top_k: int | None = None
) -> Decision:
    scores_NE = torch.randn(count, info.num_experts)
    best = scores_NE.softmax(-1).topk(top_k or info.top_k)
    return Decision(best.indices, best.values, info.num_experts, scores_NE if logits else None)


def chunk_of(
    count: int, sites: tuple[SiteInfo, ...] = infos(), *, first: int = 0, **more: Any
) -> Chunk:
    place = torch.arange(first, first + count)
    tokens = Tokens(place // 7, place % 7, torch.randint(0, 50_000, (count,)), place % 5 != 0)
    return Chunk(tokens, {info.site: decide(count, info, **more) for info in sites})


def save(path: Path, chunks: list[Chunk], meta: TraceMeta | None = None, **options: Any) -> Trace:
    with TraceWriter(path, meta or meta_of(), **options) as writer:
        for chunk in chunks:
            writer.write(chunk)
    return Trace.load(path)


def assert_same_tokens(left: Tokens, right: Tokens) -> None:
    for name in ("sample", "position", "token_id", "real"):
        assert torch.equal(getattr(left, name), getattr(right, name)), name


def assert_same(left: Trace, right: Trace) -> None:
    assert_same_tokens(left.tokens, right.tokens)
    assert (left.labels, left.text, left.sites) == (right.labels, right.text, right.sites)
    for site in left.sites:
        one, other = left[site], right[site]
        assert one.equal(other), site
        assert (one.logits is None) == (other.logits is None)
        if one.logits is not None and other.logits is not None:
            assert torch.equal(one.logits, other.logits)


def only(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------- what goes in comes out


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    shapes=st.lists(st.sampled_from([(4, 1), (8, 2), (64, 8), (3, 3)]), min_size=1, max_size=5),
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    logits=st.booleans(),
    labels=st.booleans(),
    text=st.booleans(),
)
def test_a_trace_comes_back_as_it_was(
    tmp_path: Path,
    shapes: list[tuple[int, int]],
    sizes: list[int],
    logits: bool,
    labels: bool,
    text: bool,
) -> None:
    """Tokens, experts, weights, logits, labels and text survive the file exactly."""
    sites = infos(tuple(shapes))
    chunks = [chunk_of(size, sites, logits=logits) for size in sizes if size]
    if labels:
        chunks = [replace(chunk, labels={0: "maths", 2: "law"}) for chunk in chunks]
        chunks = [
            replace(c, labels={k: v for k, v in c.labels.items() if k in c.tokens.sample})
            for c in chunks
        ]
    if text:
        chunks = [replace(c, text=tuple(f"▁{n}" for n in range(len(c.tokens)))) for c in chunks]
    meta = meta_of(sites)
    saved = save(tmp_path / "t.parquet", chunks, meta, overwrite=True)
    assert saved.meta == replace(meta, interventions=saved.meta.interventions)
    assert list(saved.meta.interventions) == list(meta.interventions)
    if chunks:
        assert_same(Trace(meta, Memory(chunks)), saved)
    else:
        assert len(saved) == 0


def test_float32_weights_are_exact_to_the_last_bit(tmp_path: Path) -> None:
    """Subnormal, huge, negative, zero and infinite values come back with the same bits."""
    sites = infos(((4, 2),))
    values = torch.tensor([[1e-45, -0.0], [3.4e38, 1.1754944e-38], [-1e-40, float("inf")]])
    logits = torch.tensor([[float("-inf"), 1e-45, -0.0, float("nan")]] * 3)
    chunk = replace(
        chunk_of(3, sites),
        decisions={sites[0].site: Decision(torch.zeros(3, 2).long(), values, 4, logits)},
    )
    decision = save(tmp_path / "t.parquet", [chunk], meta_of(sites))[sites[0].site]
    assert decision.weights.numpy().tobytes() == values.numpy().tobytes()
    assert decision.logits is not None
    assert decision.logits.numpy().tobytes() == logits.numpy().tobytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_lose_nothing(tmp_path: Path, dtype: torch.dtype) -> None:
    """bfloat16 and float16 weights are exact in float32 columns, also with a gradient."""
    sites = infos(((8, 2),))
    chunk = chunk_of(50, sites)
    old = chunk.decisions[sites[0].site]
    exact = replace(old, weights=old.weights.to(dtype).requires_grad_())
    back = save(
        tmp_path / "t.parquet", [replace(chunk, decisions={sites[0].site: exact})], meta_of(sites)
    )
    assert torch.equal(back[sites[0].site].weights.to(dtype), exact.weights.detach())


def test_float16_rounds_and_nothing_else(tmp_path: Path) -> None:
    """weights="float16" stores what float16 can hold: infinite above 65504, zero below 3e-8."""
    sites = infos(((4, 2),))
    chunk = chunk_of(3, sites, logits=True)
    weights = torch.tensor([[0.1, 1e-9], [7e4, -7e4], [6e-8, 1.0]])
    old = replace(chunk.decisions[sites[0].site], weights=weights)
    saved = save(
        tmp_path / "t.parquet",
        [replace(chunk, decisions={sites[0].site: old})],
        meta_of(sites),
        weights="float16",
    )
    new = saved[sites[0].site]
    assert new.logits is not None
    assert old.logits is not None
    assert torch.equal(new.weights, weights.half().float())
    assert torch.equal(new.logits, old.logits.half().float())
    assert torch.equal(new.indices, old.indices)


def test_ids_and_text_are_left_out_when_told(tmp_path: Path) -> None:
    """Without token_ids and text neither is in the file, and ids read as -1."""
    chunk = replace(chunk_of(5), text=tuple("abcde"))
    saved = save(tmp_path / "t.parquet", [chunk], token_ids=False, text=False)
    names = pq.read_schema(saved.path).names
    assert not {"token_id", "token"} & set(names)
    assert saved.tokens.token_id.tolist() == [-1] * 5
    assert saved.text is None


def test_an_empty_recording_is_a_valid_trace(tmp_path: Path) -> None:
    """Nothing written still makes a file that opens and says that it is empty."""
    saved = save(tmp_path / "t.parquet", [])
    assert len(saved) == 0
    assert saved.sites == tuple(info.site for info in infos())
    with pytest.raises(TraceError, match="empty"):
        _ = saved.tokens


# ---------------------------------------------------------------- streaming


def test_streaming_equals_one_save(tmp_path: Path) -> None:
    """However a run is cut into chunks, the file is the same, byte for byte."""
    sites, total = infos(), 2 * ROW_GROUP + 100
    whole = chunk_of(total, sites, logits=True)
    cuts = [0, 1, 2, 300, ROW_GROUP - 1, ROW_GROUP + 5, total - 1, total]
    pieces = [_slice(whole, one, other) for one, other in pairwise(cuts)]
    meta = meta_of(sites)
    one, many = (save(tmp_path / name, c, meta) for name, c in (("a", [whole]), ("b", pieces)))
    assert one.path is not None
    assert many.path is not None
    assert one.path.read_bytes() == many.path.read_bytes()
    assert [len(chunk.tokens) for chunk in many.chunks()] == [ROW_GROUP, ROW_GROUP, 100]
    assert_same(Trace(meta, Memory([whole])), many)


def _slice(chunk: Chunk, start: int, stop: int) -> Chunk:
    keep = torch.arange(start, stop)
    return Chunk(
        chunk.tokens.rows(keep), {site: made.rows(keep) for site, made in chunk.decisions.items()}
    )


@pytest.mark.parametrize("before", [10, ROW_GROUP + 10])
def test_columns_widen_when_later_chunks_need_more(tmp_path: Path, before: int) -> None:
    """More experts per token or the first labels in a later chunk: the file equals memory."""
    sites = infos()
    wide = chunk_of(20, sites, top_k=3, first=before)
    wide = replace(wide, labels={int(wide.tokens.sample[-1]): "late"})
    memory = Trace(meta_of(sites), Memory([chunk_of(before, sites), wide, chunk_of(5, sites)]))
    saved = save(tmp_path / "t.parquet", list(memory.chunks()), memory.meta)
    assert_same(memory, saved)
    assert only(tmp_path) == ["t.parquet"]


@pytest.mark.parametrize("before", [10, ROW_GROUP])
def test_logits_may_begin_late(tmp_path: Path, before: int) -> None:
    """A part without logits has None, or NaN where it shares a row group with one that has them."""
    sites = infos()
    late = chunk_of(8, sites, logits=True)
    saved = save(tmp_path / "t.parquet", [chunk_of(before, sites), late])
    last = list(saved.chunks())[-1].decisions[sites[0].site].logits
    assert last is not None
    assert torch.equal(last[-8:], late.decisions[sites[0].site].logits)
    first = next(saved.chunks()).decisions[sites[0].site].logits
    assert first is None if before == ROW_GROUP else torch.isnan(first[:before]).all()


def test_a_narrow_or_absent_decision_is_filled(tmp_path: Path) -> None:
    """Fewer experts than K: -1 with weight 0. A site that did not run: -1 in all of its slots."""
    sites = infos(((8, 2), (8, 2)))
    chunk = chunk_of(4, sites)
    narrow = decide(4, sites[0], top_k=1)
    narrow_chunk = replace(chunk, decisions={sites[0].site: narrow})
    saved = save(tmp_path / "t.parquet", [narrow_chunk], meta_of(sites))
    first, second = saved[sites[0].site], saved[sites[1].site]
    assert Trace(meta_of(sites), Memory([narrow_chunk]))[sites[1].site].equal(second)
    assert torch.equal(first.indices[:, :1], narrow.indices)
    assert first.indices[:, 1].tolist() == [-1] * 4
    assert first.weights[:, 1].tolist() == [0] * 4
    assert (second.indices == -1).all()
    assert not second.dense().any()


def test_only_the_sites_of_the_meta_are_written(tmp_path: Path) -> None:
    """A recording of some sites leaves the others out."""
    sites = infos()
    saved = save(tmp_path / "t.parquet", [chunk_of(4, sites)], meta_of(sites[:1]))
    assert [list(chunk.decisions) for chunk in saved.chunks()] == [[sites[0].site]]


def test_memory_and_file_give_the_sites_that_a_pattern_names(tmp_path: Path) -> None:
    """chunks(pattern) holds those and no others, wherever the trace lives."""
    memory = Trace(meta_of(), Memory([chunk_of(4)]))
    saved = save(tmp_path / "t.parquet", list(memory.chunks()))
    for trace in (memory, saved):
        assert [list(c.decisions) for c in trace.chunks("*#1")] == [[infos()[1].site]]


def test_memory_stays_flat(tmp_path: Path) -> None:
    """Writing and reading 300 000 tokens holds less than 8 MiB beyond the first row group."""
    sites = infos(((16, 2),) * 4)
    chunk = chunk_of(2048, sites)
    growth = _Growth()
    with TraceWriter(tmp_path / "t.parquet", meta_of(sites)) as writer:
        for _ in range(150):
            writer.write(chunk)
            growth.note()
    assert growth.most < 8 << 20
    growth = _Growth()
    seen = 0
    for read in Trace.load(tmp_path / "t.parquet").chunks():
        seen += len(read.tokens)
        growth.note()
    assert seen == 150 * 2048
    assert growth.most < 8 << 20


class _Growth:
    """Bytes of Arrow and of the process beyond those at the tenth note."""

    def __init__(self) -> None:
        self.most, self._notes, self._base = 0, 0, 0

    def note(self) -> None:
        self._notes += 1
        used = max(pa.total_allocated_bytes(), 0) + _resident()
        if self._notes == 10:
            self._base = used
        if self._notes > 10:
            self.most = max(self.most, used - self._base)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# ---------------------------------------------------------------- reading


def test_sites_of_one_shape_share_columns(tmp_path: Path) -> None:
    """One group has plain names; several are numbered, in the order of their first sites."""
    one = save(tmp_path / "one", [chunk_of(3, infos(((8, 2),) * 3))], meta_of(infos(((8, 2),) * 3)))
    two = save(tmp_path / "two", [chunk_of(3, logits=True)])
    tokens = ["sample", "position", "token_id", "real"]
    assert pq.read_schema(one.path).names == [*tokens, "experts", "weights"]
    schema = pq.read_schema(two.path)
    assert schema.names == [
        *tokens,
        "experts_1",
        "weights_1",
        "logits_1",
        "experts_2",
        "weights_2",
        "logits_2",
    ]
    assert schema.field("experts_1").type == pa.list_(pa.int16(), 2 * 2)
    assert schema.field("logits_2").type == pa.list_(pa.float32(), 1 * 5)


def test_only_the_columns_asked_for_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No sites: token columns alone. A site: those of its group."""
    saved = save(tmp_path / "t.parquet", [chunk_of(3)])
    asked: list[list[str]] = []
    read = pq.ParquetFile.read_row_group

    def spy(self: Any, number: int, columns: list[str]) -> Any:
        asked.append(columns)
        return read(self, number, columns=columns)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", spy)
    _ = saved.tokens
    _ = saved[saved.sites[2]]
    tokens = ["sample", "position", "token_id", "real"]
    assert asked == [tokens, [*tokens, "experts_2", "weights_2"]]


def test_a_saved_trace_can_be_saved_again_in_place(tmp_path: Path) -> None:
    """Saving a file over itself, as while changing its precision, keeps all of it."""
    saved = save(tmp_path / "t.parquet", [chunk_of(30)])
    before = {site: saved[site] for site in saved.sites}
    saved.save(tmp_path / "t.parquet", overwrite=True)
    assert all(saved[site].equal(before[site]) for site in saved.sites)


def test_a_file_that_is_being_written_says_so(tmp_path: Path) -> None:
    """The trace of a streaming run can be held, but read only when the block has ended."""
    path, meta = tmp_path / "t.parquet", meta_of()
    trace = Trace(meta, ParquetStore(path, meta))
    with TraceWriter(path, meta) as writer:
        writer.write(chunk_of(4))
        with pytest.raises(TraceError, match="block has ended"):
            _ = trace.tokens
        assert "not readable yet" in repr(trace)
    assert "4 tokens" in repr(trace)


def test_another_trace_under_the_same_name_is_noticed(tmp_path: Path) -> None:
    """A trace that is replaced while it is held is an error, not a mixture."""
    held = save(tmp_path / "t.parquet", [chunk_of(4)])
    save(tmp_path / "t.parquet", [chunk_of(4)], meta_of(infos(((9, 1),))), overwrite=True)
    with pytest.raises(TraceError, match="replaced"):
        _ = held.tokens


# ---------------------------------------------------------------- other tools


@pytest.fixture(scope="module")
def shared_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trace]:
    sites = infos(((8, 2), (8, 2)))
    path = tmp_path_factory.mktemp("tools") / "trace.parquet"
    chunk = chunk_of(70, sites, logits=True)
    labels = {int(number): "ab"[number % 2] for number in chunk.tokens.sample.unique()}
    chunk = replace(chunk, labels=labels, text=tuple(f"t{n}" for n in range(70)))
    return path, save(path, [chunk], meta_of(sites), weights="float16")


def test_pandas_opens_it(shared_file: tuple[Path, Trace]) -> None:
    """One row per token; lists are arrays, site after site."""
    path, trace = shared_file
    frame = pandas.read_parquet(path)
    experts = np.stack(list(frame["experts"])).reshape(-1, 2, 2)
    assert (experts[:, 1] == trace[trace.sites[1]].indices.numpy()).all()
    assert list(frame["label"][:14]) == ["a"] * 7 + ["b"] * 7
    assert frame["token"][3] == "t3"


def test_polars_opens_it(shared_file: tuple[Path, Trace]) -> None:
    """Lists are arrays of fixed width."""
    path, trace = shared_file
    frame = polars.read_parquet(path)
    assert frame.schema["experts"] == polars.Array(polars.Int16, 4)
    weights = frame["weights"].to_numpy().reshape(-1, 2, 2)
    assert (weights[:, 0] == trace[trace.sites[0]].weights.numpy()).all()


def test_duckdb_counts_tokens_per_expert(shared_file: tuple[Path, Trace]) -> None:
    """One line of SQL gives each expert's load, also of a float16 file."""
    path, trace = shared_file
    counted = duckdb.sql(
        f"SELECT expert, count(*) FROM (SELECT unnest(experts[1:2]) AS expert FROM '{path}') "
        f"GROUP BY expert ORDER BY expert"
    ).fetchall()
    experts, counts = trace[trace.sites[0]].indices.unique(return_counts=True)
    assert counted == list(zip(experts.tolist(), counts.tolist(), strict=True))
    total = duckdb.sql(f"SELECT sum(list_sum(weights)) FROM '{path}'").fetchall()[0][0]
    expected = sum(float(trace[site].weights.double().sum()) for site in trace.sites)
    assert total == pytest.approx(expected, rel=1e-5)


# ---------------------------------------------------------------- whole or absent


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    """A block that fails leaves neither a file nor a temporary one, and keeps an older file."""
    old = save(tmp_path / "t.parquet", [chunk_of(3)])

    def fail() -> None:
        with TraceWriter(tmp_path / "t.parquet", meta_of(), overwrite=True) as writer:
            writer.write(chunk_of(ROW_GROUP + 3))
            assert len(only(tmp_path)) == 2
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert only(tmp_path) == ["t.parquet"]
    assert len(old) == 3


_ENDLESS = """
import sys, torch
sys.path.insert(0, {tests!r})
from test_parquet import TraceWriter, chunk_of, meta_of
with TraceWriter({path!r}, meta_of()) as writer:
    while True:
        writer.write(chunk_of(8192))
        print("written", flush=True)
"""


def test_a_killed_run_leaves_no_file(tmp_path: Path) -> None:
    """SIGKILL in the middle of writing: nothing has the final name, and the next run succeeds."""
    path = tmp_path / "t.parquet"
    script = _ENDLESS.format(tests=str(Path(__file__).parent), path=str(path))
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert child.stdout is not None
    with child.stdout:
        child.stdout.readline()
        child.stdout.readline()
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert only(tmp_path) == [f".t.parquet.{child.pid}.partial"]
    assert len(save(path, [chunk_of(3)])) == 3


def test_a_leftover_of_the_same_process_number_is_no_obstacle(tmp_path: Path) -> None:
    """Process numbers return (in containers at once): a stale temporary file is stepped around."""
    stale = tmp_path / f".t.parquet.{os.getpid()}.partial"
    stale.write_bytes(b"stale")
    assert len(save(tmp_path / "t.parquet", [chunk_of(3)])) == 3
    assert stale.read_bytes() == b"stale"


def test_a_file_is_not_overwritten_unasked(tmp_path: Path) -> None:
    """The refusal comes before anything runs, and the file stays as it was."""
    path = tmp_path / "t.parquet"
    path.write_text("precious")
    with pytest.raises(OutputError, match="overwrite"), TraceWriter(path, meta_of()):
        pytest.fail("the block ran")
    assert path.read_text() == "precious"


def test_a_file_that_appears_meanwhile_survives_and_so_does_the_recording(tmp_path: Path) -> None:
    """Two runs to one name: the second keeps its whole recording beside it, and says where."""
    path = tmp_path / "t.parquet"

    def race() -> None:
        with TraceWriter(path, meta_of()) as writer:
            writer.write(chunk_of(3))
            path.write_text("precious")

    with pytest.raises(OutputError, match="whole in") as caught:
        race()
    assert path.read_text() == "precious"
    kept = next(name for name in only(tmp_path) if name.endswith(".partial"))
    assert kept in str(caught.value)
    assert len(Trace.load(tmp_path / kept)) == 3


def test_parents_are_made(tmp_path: Path) -> None:
    """Missing folders on the way are created."""
    assert len(save(tmp_path / "a" / "b" / "t.parquet", [chunk_of(3)])) == 3


@pytest.mark.parametrize("place", ["file/t.parquet", "file/deeper/t.parquet", "folder", "."])
def test_a_path_in_the_way_is_an_output_error(tmp_path: Path, place: str) -> None:
    """A parent that is a file, or a folder where the file should be."""
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with (
        pytest.raises(OutputError, match=r"cannot write|folder"),
        TraceWriter(tmp_path / place, meta_of()),
    ):
        pytest.fail("the block ran")
    assert only(tmp_path) == ["file", "folder"]


def test_no_permission_is_an_output_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found out before anything runs."""

    def denied(target: Path) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", str(target))

    monkeypatch.setattr(partial, "_create", denied)
    with pytest.raises(OutputError, match="no permission"), TraceWriter(tmp_path / "t", meta_of()):
        pytest.fail("the block ran")


class _Full:
    """A file on a disk with room for so many bytes."""

    def __init__(self, file: Any, room: int) -> None:
        self._file, self._room = file, room

    def write(self, data: Any) -> int:
        self._room -= len(memoryview(data))
        if self._room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return int(self._file.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@pytest.fixture
def small_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    create = partial._create

    def shrink(room: int) -> None:
        def made(target: Path) -> tuple[Path, Any]:
            path, file = create(target)
            return path, _Full(file, room)

        monkeypatch.setattr(partial, "_create", made)

    return shrink


@pytest.mark.parametrize("room", [0, 1000, 150_000])
def test_a_full_disk_is_an_output_error(
    tmp_path: Path, small_disk: Callable[[int], None], room: int
) -> None:
    """At the header, in a row group or in the footer: said in words, and nothing is left."""
    small_disk(room)
    with pytest.raises(OutputError, match="disk is full"):
        save(tmp_path / "t", [chunk_of(1000) for _ in range(20)])
    assert only(tmp_path) == []


def test_a_failed_write_cannot_be_ignored(
    tmp_path: Path, small_disk: Callable[[int], None]
) -> None:
    """A caller that swallows the error gets it again at the end: no file with a hole."""
    small_disk(1000)

    def careless() -> None:
        with TraceWriter(tmp_path / "t", meta_of()) as writer:
            with pytest.raises(OutputError):
                writer.write(chunk_of(ROW_GROUP))
            writer.write(chunk_of(5))

    with pytest.raises(OutputError, match="failed before"):
        careless()
    assert only(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux only")
def test_the_systems_own_full_device_is_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """/dev/full, the kernel's ENOSPC through Python and Arrow."""
    with Path("/dev/full").open("wb") as full:
        monkeypatch.setattr(partial, "_create", lambda _: (tmp_path / ".t.partial", full))
        with pytest.raises(OutputError, match="disk is full"):
            save(tmp_path / "t", [chunk_of(ROW_GROUP + 1)])


# ---------------------------------------------------------------- bad input


def test_a_wrong_precision_is_named() -> None:
    """bfloat16 needs no option: float32 holds it exactly."""
    with pytest.raises(ConfigError, match="float32 or float16"):
        TraceWriter("t", meta_of(), weights="bfloat16")


def test_more_experts_than_int16_is_an_error() -> None:
    """Said before anything is recorded."""
    with pytest.raises(TraceError, match="40000 experts"):
        TraceWriter("t", meta_of(infos(((40_000, 2),))))


def test_a_chunk_must_fit_together(tmp_path: Path) -> None:
    """Decisions and text for another number of tokens are refused."""
    chunk = chunk_of(5)
    wrong: Mapping[Site, Decision] = {infos()[0].site: decide(4, infos()[0])}
    with TraceWriter(tmp_path / "t", meta_of()) as writer:
        with pytest.raises(TraceError, match="4 decisions"):
            writer.write(replace(chunk, decisions=wrong))
        with pytest.raises(TraceError, match="1 token strings"):
            writer.write(replace(chunk, text=("a",)))
        writer.write(chunk)
    assert len(Trace.load(tmp_path / "t")) == 5
    with pytest.raises(TraceError, match="with block"):
        writer.write(chunk)


def _damage(kind: str, path: Path) -> None:
    whole = path.read_bytes()
    if kind == "text":
        path.write_text("not parquet at all")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "foreign":
        pq.write_table(pa.table({"experts": [1, 2]}), path)
    else:
        contents = {"broken json": b"{", "not ours": b'{"schema": 1}', "list": b"[]"}[kind]
        pq.write_table(pq.read_table(path).replace_schema_metadata({layout.KEY: contents}), path)


@pytest.mark.parametrize(
    "kind", ["text", "empty", "truncated", "foreign", "broken json", "not ours", "list"]
)
def test_what_is_no_trace_is_a_corrupt_trace(tmp_path: Path, kind: str) -> None:
    """The error names the file and says what to do."""
    path = tmp_path / "t.parquet"
    save(path, [chunk_of(50)])
    _damage(kind, path)
    with pytest.raises(CorruptTraceError, match=r"t\.parquet.*record it again"):
        read_meta(path)


def test_a_missing_column_is_a_corrupt_trace(tmp_path: Path) -> None:
    """A file that another program stripped."""
    path = tmp_path / "t.parquet"
    trace = save(path, [chunk_of(50)])
    pq.write_table(pq.read_table(path).drop_columns(["weights_1"]), path)
    with pytest.raises(CorruptTraceError):
        _ = trace[trace.sites[0]]


def test_a_flipped_byte_is_never_read_as_data(tmp_path: Path) -> None:
    """Every page has a checksum: damage is an error, or hits a byte that means nothing."""
    path = tmp_path / "t.parquet"
    saved = save(path, [chunk_of(400)])
    whole, good = path.read_bytes(), {site: saved[site] for site in saved.sites}
    tokens, errors = saved.tokens, 0
    for offset in np.random.default_rng(0).integers(4, len(whole) * 3 // 4, 40):
        path.write_bytes(whole[:offset] + bytes([whole[offset] ^ 0x10]) + whole[offset + 1 :])
        try:
            loaded = Trace.load(path)
            assert_same_tokens(loaded.tokens, tokens)
            assert all(loaded[site].equal(good[site]) for site in good)
        except CorruptTraceError:
            errors += 1
    assert errors > 20


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    """The message says to upgrade, and that the file is not broken."""
    path = tmp_path / "t.parquet"
    save(path, [chunk_of(5)])
    table = pq.read_table(path)
    newer = b'{"schema": %d}' % (SCHEMA_VERSION + 1)
    pq.write_table(table.replace_schema_metadata({layout.KEY: newer}), path)
    with pytest.raises(TraceError, match="Upgrade") as caught:
        Trace.load(path)
    assert not isinstance(caught.value, CorruptTraceError)


@pytest.mark.parametrize("place", ["missing.parquet", "."])
def test_a_missing_file_is_a_trace_error(tmp_path: Path, place: str) -> None:
    """Neither a file that is not there nor a folder is called corrupt."""
    with pytest.raises(TraceError, match=r"no trace file|folder") as caught:
        Trace.load(tmp_path / place)
    assert not isinstance(caught.value, CorruptTraceError)
