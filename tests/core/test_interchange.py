"""Laws of import and export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmix.core.decision import Decision
from expertmix.core.interchange import from_routed_experts, to_routed_experts, to_table
from expertmix.core.site import Site, SiteInfo
from expertmix.core.tokens import Tokens
from expertmix.core.trace import Chunk, Memory, Trace, TraceMeta
from expertmix.errors import TraceError, UnknownExpertError, UnknownSiteError


def infos(layers: int, experts: int = 8, top_k: int = 2) -> tuple[SiteInfo, ...]:
    return tuple(SiteInfo(Site(f"model.layers.{n}.mlp"), experts, top_k) for n in range(layers))


def routed(tokens: int, layers: int, experts: int = 8, top_k: int = 2, seed: int = 0) -> Any:
    scores = np.random.default_rng(seed).random((tokens, layers, experts))
    return scores.argsort(-1)[..., :top_k].astype(np.int16)


def two_passes(sites: tuple[SiteInfo, ...], widths: tuple[int, int] = (2, 2)) -> Trace:
    """Two samples: a prompt pass of three columns, with padding, then a step of decoding."""
    prompt = Tokens(
        torch.tensor([0, 0, 0, 1, 1, 1]),
        torch.tensor([0, 1, 2, -1, 0, 1]),
        torch.arange(6),
        torch.tensor([True, True, True, False, True, True]),
    )
    step = Tokens(
        torch.tensor([0, 1]), torch.tensor([3, 2]), torch.tensor([6, 7]), torch.ones(2).bool()
    )
    chunks = []
    for tokens, width in zip((prompt, step), widths, strict=True):
        decisions = {
            info.site: Decision(
                torch.rand(len(tokens), info.num_experts).topk(width).indices,
                torch.rand(len(tokens), width),
                info.num_experts,
            )
            for info in sites
        }
        chunks.append(Chunk(tokens, decisions))
    return Trace(TraceMeta("f", "m", sites), Memory(chunks))


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(0, 30),
    layers=st.integers(1, 4),
    top_k=st.integers(1, 4),
    dtype=st.sampled_from([np.uint8, np.int16, np.uint16, np.int32, np.int64]),
)
def test_import_and_export_are_inverse(tokens: int, layers: int, top_k: int, dtype: Any) -> None:
    """vLLM's array comes back as it was, whatever integers it holds."""
    array = routed(tokens, layers, top_k=top_k)
    trace = from_routed_experts(array.astype(dtype), sites=infos(layers, top_k=top_k))
    exported = to_routed_experts(trace)
    assert exported.dtype == np.int16
    assert exported.shape == (tokens, layers, top_k)
    assert (exported == array).all()


def test_slots_are_layers_in_the_models_order() -> None:
    """array[t, l, k] is the k-th expert of token t at site l."""
    trace = two_passes(infos(3))
    exported = to_routed_experts(trace)
    for layer, site in enumerate(trace.sites):
        assert (exported[:, layer] == trace[site].indices.numpy()).all()


def test_one_sample_is_what_a_request_returns() -> None:
    """sample=1: its real tokens in the order of their positions, prompt and decoding."""
    trace = two_passes(infos(2))
    assert (to_routed_experts(trace, sample=1) == to_routed_experts(trace)[[4, 5, 7]]).all()


def test_a_sample_that_is_not_there_is_told() -> None:
    """An empty array would look like a request without tokens."""
    with pytest.raises(TraceError, match="no sample 9"):
        to_routed_experts(two_passes(infos(2)), sample=9)


def test_a_file_exports_like_memory(tmp_path: Path) -> None:
    """Saving and loading changes nothing of the export."""
    trace = two_passes(infos(2))
    saved = Trace.load(trace.save(tmp_path / "t.parquet"))
    assert (to_routed_experts(saved) == to_routed_experts(trace)).all()
    assert to_table(saved).to_pylist() == to_table(trace).to_pylist()


def test_passes_of_other_width_are_filled() -> None:
    """A token with fewer experts than another has -1 in its last slots."""
    exported = to_routed_experts(two_passes(infos(2), widths=(2, 3)))
    assert exported.shape == (8, 2, 3)
    assert (exported[:6, :, 2] == -1).all()
    assert (exported[6:] >= 0).all()


def test_sites_of_other_width_cannot_be_one_array() -> None:
    """The error says what to do."""
    sites = (*infos(2), SiteInfo(Site("other"), 8, 3))
    chunk = next(two_passes(sites).chunks())
    wide = {
        **chunk.decisions,
        sites[2].site: Decision(torch.zeros(6, 3).long(), torch.ones(6, 3), 8),
    }
    trace = Trace(TraceMeta("f", "m", sites), Memory([Chunk(chunk.tokens, wide)]))
    with pytest.raises(TraceError, match=r"\[2, 3\] experts per token.*to_table"):
        to_routed_experts(trace)


def test_an_empty_trace_has_nothing_to_export() -> None:
    """A typed error, not an empty array of unknown width."""
    with pytest.raises(TraceError, match="empty"):
        to_routed_experts(Trace(TraceMeta("f", "m", infos(2)), Memory()))


def test_weights_are_equal_where_unknown() -> None:
    """Without weights each selected expert of a token has the same, and they sum to one."""
    array = np.array([[[3, 1]], [[2, -1]], [[-1, -1]]])
    decision = from_routed_experts(array, sites=infos(1))[infos(1)[0].site]
    assert decision.weights.tolist() == [[0.5, 0.5], [1.0, 0.0], [0.0, 0.0]]


def test_weights_are_kept_where_given() -> None:
    """And the settings say which it was."""
    array = routed(5, 2)
    weights = np.random.default_rng(0).random((5, 2, 2)).astype(np.float32)
    trace = from_routed_experts(array, sites=infos(2), weights=weights)
    assert (trace[trace.sites[1]].weights.numpy() == weights[:, 1]).all()
    assert "given" in trace.meta.settings["imported"]
    assert "unknown" in from_routed_experts(array, sites=infos(2)).meta.settings["imported"]


def test_positions_count_within_a_sample() -> None:
    """Also when the samples are interleaved, as in decoding."""
    sample = [0, 0, 1, 1, 1, 0, 1, 0]
    trace = from_routed_experts(routed(8, 1), sites=infos(1), sample=sample, token_ids=range(8))
    assert trace.tokens.position.tolist() == [0, 1, 0, 1, 2, 2, 3, 3]
    assert trace.tokens.sample.tolist() == sample
    assert trace.tokens.token_id.tolist() == list(range(8))
    assert trace.meta.fingerprint == ""


@pytest.mark.parametrize(
    ("array", "more", "message"),
    [
        (routed(4, 3), {}, "2 sites need"),
        (routed(4, 2, top_k=3), {}, "2 sites need"),
        (routed(4, 2)[0], {}, "2 sites need"),
        (routed(4, 2).astype(np.float32), {}, "whole numbers"),
        (routed(4, 2), {"weights": np.ones((4, 2))}, "weights has shape"),
        (routed(4, 2), {"weights": np.full((4, 2, 2), np.nan)}, "weights must be finite"),
        (routed(4, 2), {"token_ids": [1, 2]}, "token_ids has shape"),
        (routed(4, 2), {"sample": [1, 2]}, "sample has shape"),
    ],
)
def test_what_does_not_fit_is_named(array: Any, more: dict[str, Any], message: str) -> None:
    """Shapes and types are checked, with both sides in the message."""
    with pytest.raises(TraceError, match=message):
        from_routed_experts(array, sites=infos(2), **more)


@pytest.mark.parametrize("wrong", [8, -2])
def test_an_expert_that_the_site_lacks_is_named(wrong: int) -> None:
    """Most likely the array is of another model."""
    array = routed(4, 2)
    array[2, 1, 0] = wrong
    with pytest.raises(UnknownExpertError, match=rf"layers\.1.*0 to 7, not {wrong}"):
        from_routed_experts(array, sites=infos(2))


def test_the_table_has_a_row_per_selected_expert() -> None:
    """Real tokens only, and only slots that are filled."""
    trace = two_passes(infos(2), widths=(2, 3))
    table = to_table(trace)
    assert table.column_names == ["sample", "position", "site", "rank", "expert", "weight"]
    assert len(table) == 2 * (5 * 2 + 2 * 3)
    frame = polars.from_arrow(table)
    assert isinstance(frame, polars.DataFrame)
    row = frame.filter(sample=1, position=2, site="model.layers.1.mlp#0", rank=2).row(0, named=True)
    decision = trace[trace.sites[1]]
    assert row["expert"] == int(decision.indices[7, 2])
    assert row["weight"] == pytest.approx(float(decision.weights[7, 2]))


def test_the_table_takes_a_pattern() -> None:
    """Some sites, or an error that lists near names."""
    trace = two_passes(infos(3))
    assert set(to_table(trace, "layers.1.*")["site"].to_pylist()) == {"model.layers.1.mlp#0"}
    with pytest.raises(UnknownSiteError):
        to_table(trace, "nowhere")


def test_sql_over_the_table() -> None:
    """DuckDB takes the table as it is."""
    trace = two_passes(infos(2))
    mass = duckdb.from_arrow(to_table(trace)).filter("site LIKE '%.0.%'").sum("weight")
    real = trace.tokens.real
    expected = float(trace[trace.sites[0]].weights[real].double().sum())
    assert mass.fetchall()[0][0] == pytest.approx(expected, rel=1e-5)


def test_an_empty_trace_is_an_empty_table() -> None:
    """With the same columns."""
    assert to_table(Trace(TraceMeta("f", "m", infos(2)), Memory())).num_rows == 0
