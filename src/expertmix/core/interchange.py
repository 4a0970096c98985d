"""Traces in other people's shapes: vLLM's `routed_experts`, and one long table.

vLLM and SGLang return, per request, an array [tokens, layers, top_k] of expert numbers without
weights (https://docs.vllm.ai/en/latest/training/routed_experts/); training with routing replay
reads it. This file opens no files.

Legend: N tokens, S sites (layers), K selected experts, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from expertmix.core.decision import Decision
from expertmix.core.layout import MOST_EXPERTS
from expertmix.core.site import Site, SiteInfo, match
from expertmix.core.tokens import Tokens
from expertmix.core.trace import Chunk, Memory, Trace, TraceMeta
from expertmix.errors import TraceError, UnknownExpertError


def to_routed_experts(trace: Trace, *, sample: int | None = None) -> NDArray[np.int16]:
    """Expert numbers in vLLM's layout; weights have no place in it.

    Args:
        trace: What to export.
        sample: Only the real tokens of this sample, in order, as vLLM returns them per request.
            Otherwise all tokens, padding included, row by row as in `trace.tokens`.

    Returns:
        (N, S, K) int16. -1 where a token had fewer than K experts.

    Raises:
        TraceError: The sites do not all choose the same number of experts, have more than int16
            can number, the trace is empty, or has no such sample.
    """
    if any(info.num_experts > MOST_EXPERTS for info in trace.meta.sites):
        raise TraceError(f"routed_experts is int16: a site has more than {MOST_EXPERTS} experts")
    parts = [_block(chunk, trace.sites, sample) for chunk in trace.chunks()]
    if not parts:
        raise TraceError("the trace is empty: there is nothing to export")
    if sample is not None and not any(map(len, parts)):
        raise TraceError(f"the trace has no sample {sample}: trace.tokens.sample numbers them")
    top_k = max(part_NSK.shape[2] for part_NSK in parts)
    return np.concatenate([_widened(part_NSK, top_k) for part_NSK in parts])


def _block(chunk: Chunk, sites: Sequence[Site], sample: int | None) -> NDArray[np.int16]:
    found = [chunk.decisions[site] for site in sites if site in chunk.decisions]
    widths = {decision.top_k for decision in found}
    if len(found) < len(sites) or len(widths) != 1:
        raise TraceError(
            f"routed_experts is one array [tokens, layers, top_k], but this trace has "
            f"{sorted(widths)} experts per token and decisions at {len(found)} of {len(sites)} "
            f"sites. Record sites of one kind (sites=…), or use to_table."
        )
    experts_NSK = torch.stack([decision.indices.cpu() for decision in found], dim=1)
    if sample is not None:
        experts_NSK = experts_NSK[(chunk.tokens.sample == sample) & chunk.tokens.real]
    array: NDArray[np.int16] = experts_NSK.to(torch.int16).numpy()
    return array


def _widened(experts_NSK: NDArray[np.int16], top_k: int) -> NDArray[np.int16]:
    missing = top_k - experts_NSK.shape[2]
    return np.pad(experts_NSK, ((0, 0), (0, 0), (0, missing)), constant_values=-1)


def from_routed_experts(
    array: ArrayLike,
    *,
    sites: Sequence[SiteInfo],
    weights: ArrayLike | None = None,
    token_ids: ArrayLike | None = None,
    sample: ArrayLike | None = None,
) -> Trace:
    """A trace from vLLM's layout.

    Its fingerprint is empty, because the array does not say whose it is: `Replay` takes it only
    with `any_model=True`.

    Args:
        array: (N, S, K) expert numbers of any integer type, -1 for none.
        sites: The S sites, in the array's order: `em.sites(model)`.
        weights: (N, S, K); without it each selected expert of a token has the same weight, and the
            weights of a token sum to one.
        token_ids: (N,).
        sample: (N,) number of the sequence, one sequence by default. Positions count the tokens of
            a sequence in the order in which they come.

    Raises:
        TraceError: The shapes do not fit together, the numbers are not whole, or the weights not
            finite.
        UnknownExpertError: A number that the site has no expert for.
    """
    experts_NSK = _integers(array, "routed_experts")
    _check(experts_NSK, sites)
    weights_NSK = _uniform(experts_NSK) if weights is None else np.asarray(weights, np.float32)
    _same_shape("weights", weights_NSK, experts_NSK.shape)
    if not np.isfinite(weights_NSK).all():
        raise TraceError("weights must be finite numbers: some are NaN or infinite")
    tokens = _tokens(len(experts_NSK), token_ids, sample)
    decisions = {
        info.site: Decision(
            torch.from_numpy(experts_NSK[:, slot].copy()),
            torch.from_numpy(weights_NSK[:, slot].copy()),
            info.num_experts,
        )
        for slot, info in enumerate(sites)
    }
    origin = "routed_experts, weights " + (
        "unknown: taken as equal" if weights is None else "given"
    )
    meta = TraceMeta("", "", tuple(sites), settings={"imported": origin})
    return Trace(meta, Memory([Chunk(tokens, decisions)]))


def _integers(values: ArrayLike, name: str) -> NDArray[np.int64]:
    array = np.asarray(values)
    if not np.issubdtype(array.dtype, np.integer):
        raise TraceError(f"{name} must hold whole numbers, not {array.dtype}")
    return array.astype(np.int64)


def _check(experts_NSK: NDArray[np.int64], sites: Sequence[SiteInfo]) -> None:
    kinds = {(len(sites), info.top_k) for info in sites}
    if experts_NSK.ndim != 3 or kinds != {experts_NSK.shape[1:]}:
        wanted = ", ".join(f"[tokens, {layers}, {top_k}]" for layers, top_k in sorted(kinds))
        raise TraceError(
            f"routed_experts has shape {list(experts_NSK.shape)}, these {len(sites)} sites need "
            f"{wanted or 'at least one site'}"
        )
    for slot, info in enumerate(sites):
        numbers_NK = experts_NSK[:, slot]
        wrong = numbers_NK[(numbers_NK < -1) | (numbers_NK >= info.num_experts)]
        if wrong.size:
            raise UnknownExpertError(
                f"{info.site} has experts 0 to {info.num_experts - 1}, not {wrong[0]}; are these "
                f"the sites of the same model, in its order?"
            )


def _same_shape(name: str, array: NDArray[Any], shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise TraceError(f"{name} has shape {list(array.shape)}, it must be {list(shape)}")


def _uniform(experts_NSK: NDArray[np.int64]) -> NDArray[np.float32]:
    present_NSK = experts_NSK >= 0
    counts_NS1 = present_NSK.sum(2, keepdims=True).clip(min=1)
    weights_NSK: NDArray[np.float32] = (present_NSK / counts_NS1).astype(np.float32)
    return weights_NSK


def _tokens(count: int, token_ids: ArrayLike | None, sample: ArrayLike | None) -> Tokens:
    ids_N = np.full(count, -1) if token_ids is None else _integers(token_ids, "token_ids")
    sample_N = np.zeros(count, np.int64) if sample is None else _integers(sample, "sample")
    _same_shape("token_ids", ids_N, (count,))
    _same_shape("sample", sample_N, (count,))
    return Tokens(
        torch.from_numpy(sample_N),
        torch.from_numpy(_positions(sample_N)),
        torch.from_numpy(ids_N),
        torch.ones(count, dtype=torch.bool),
    )


def _positions(sample_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many tokens of the same sample came before."""
    order_N = np.argsort(sample_N, kind="stable")
    sorted_N = sample_N[order_N]
    first_N = np.searchsorted(sorted_N, sorted_N)
    positions_N = np.empty_like(sample_N)
    positions_N[order_N] = np.arange(len(sample_N)) - first_N
    return positions_N


def to_table(trace: Trace, pattern: str = "*") -> Any:
    """A trace as one long Arrow table, for pandas, polars and DuckDB.

    Rows are in the order of tokens, then sites, then rank; padding and empty slots are left out.
    There are up to N * S * K of them with 30 bytes each: name fewer sites where that is too much.

    Args:
        trace: What to export.
        pattern: Which sites.

    Returns:
        A `pyarrow.Table` with the columns `sample`, `position` (int64), `site` (dictionary of
        strings), `rank` (int16, 0 for the slot that the router filled first), `expert` (int32) and
        `weight` (float32).

    Raises:
        UnknownSiteError: No site matches.
    """
    sites = match(pattern, trace.sites)
    parts = [_long(chunk, sites) for chunk in trace.chunks(pattern)]
    return pa.concat_tables([_LONG.empty_table(), *parts])


_LONG = pa.schema(
    {
        "sample": pa.int64(),
        "position": pa.int64(),
        "site": pa.dictionary(pa.int32(), pa.string()),
        "rank": pa.int16(),
        "expert": pa.int32(),
        "weight": pa.float32(),
    }
)


def _long(chunk: Chunk, sites: Sequence[Site]) -> Any:
    present = [site for site in sites if site in chunk.decisions]
    if not present:
        return _LONG.empty_table()
    found = [chunk.decisions[site] for site in present]
    top_k = max(decision.top_k for decision in found)
    experts_NSK = torch.stack([_padded(made.indices, top_k, -1) for made in found], dim=1)
    weights_NSK = torch.stack([_padded(made.weights, top_k, 0) for made in found], dim=1)
    kept_NSK = (experts_NSK >= 0) & chunk.tokens.real[:, None, None]
    row, slot, rank = kept_NSK.nonzero(as_tuple=True)
    names = pa.array([str(site) for site in sites])
    codes = torch.tensor([sites.index(site) for site in present], dtype=torch.int32)[slot]
    return pa.table(
        [
            pa.array(chunk.tokens.sample[row].numpy()),
            pa.array(chunk.tokens.position[row].numpy()),
            pa.DictionaryArray.from_arrays(pa.array(codes.numpy()), names),
            pa.array(rank.to(torch.int16).numpy()),
            pa.array(experts_NSK[kept_NSK].to(torch.int32).numpy()),
            pa.array(weights_NSK[kept_NSK].float().numpy()),
        ],
        schema=_LONG,
    )


def _padded(values_NK: Tensor, top_k: int, fill: int) -> Tensor:
    missing = top_k - values_NK.shape[1]
    return torch.nn.functional.pad(values_NK.detach().cpu(), (0, missing), value=fill)
