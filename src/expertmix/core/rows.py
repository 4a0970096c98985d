"""Chunks to the rows of a row group, and back.

A decoding step is copied into the columns at once, because a million small tensors would weigh far
more than what they hold. This file opens no files.

Legend: R rows of a row group, N of them in use, S sites of a group, K selected experts, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from expertmix.core.decision import Decision
from expertmix.core.layout import Group, Layout
from expertmix.core.site import Site
from expertmix.core.tokens import Tokens
from expertmix.core.trace import Chunk

ROW_GROUP = 8192  # tokens; all that writer and reader ever hold


class Rows:
    """Up to R rows in the making."""

    def __init__(self, layout: Layout) -> None:
        self.used = 0
        self._layout = layout
        self._columns: dict[str, NDArray[Any]] = {
            name: np.full(ROW_GROUP, None, object) if name in ("label", "token")
            else np.zeros(ROW_GROUP, bool if name == "real" else np.int32)
            for name in layout.token_columns
        }  # fmt: skip
        self._slots: dict[Site, tuple[NDArray[Any], ...]] = {}
        for group in layout.groups:
            blocks = tuple(_block(group, name) for name in group.columns)
            self._columns |= dict(zip(group.columns, blocks, strict=True))
            for number, site in enumerate(group.sites):
                self._slots[site] = tuple(block_RSx[:, number] for block_RSx in blocks)

    def take(self, chunk: Chunk, start: int) -> int:
        """Copy tokens of a chunk from `start` on; how many there was room for."""
        taken = min(ROW_GROUP - self.used, len(chunk.tokens) - start)
        to, of = slice(self.used, self.used + taken), slice(start, start + taken)
        self._take_tokens(chunk, to, of)
        for site, decision in chunk.decisions.items():
            if site in self._slots:
                self._take_decision(self._slots[site], decision, to, of)
        self.used += taken
        return taken

    def _take_tokens(self, chunk: Chunk, to: slice, of: slice) -> None:
        tokens, columns = chunk.tokens, self._columns
        columns["sample"][to] = tokens.sample[of].cpu().numpy()
        columns["position"][to] = tokens.position[of].cpu().numpy()
        columns["real"][to] = tokens.real[of].cpu().numpy()
        if "token_id" in columns:
            columns["token_id"][to] = tokens.token_id[of].cpu().numpy()
        if chunk.labels:
            columns["label"][to] = [chunk.labels.get(key) for key in tokens.sample[of].tolist()]
        if "token" in columns and chunk.text is not None:
            columns["token"][to] = chunk.text[of]

    def _take_decision(
        self, slots: tuple[NDArray[Any], ...], decision: Decision, to: slice, of: slice
    ) -> None:
        experts_RK, weights_RK, *logits = slots
        width, half = decision.top_k, self._layout.precision == "float16"
        experts_RK[to, :width] = decision.indices[of].cpu().numpy()
        weights_RK[to, :width] = _floats(decision.weights[of], half=half)
        if decision.logits is not None:
            logits[0][to] = _floats(decision.logits[of], half=half)

    def grown(self, layout: Layout) -> Rows:
        """The same rows in wider columns."""
        wide = Rows(layout)
        wide.used = self.used
        for name in self._layout.token_columns:
            wide._columns[name] = self._columns[name]
        for site, slots in self._slots.items():
            for old_Rx, new_Rx in zip(slots, wide._slots[site], strict=False):
                new_Rx[:, : old_Rx.shape[1]] = old_Rx
        return wide

    def table(self, schema: Any) -> Any:
        """The rows as an Arrow table."""
        return pa.table(
            [_arrow(self._columns[field.name][: self.used], field.type) for field in schema],
            schema=schema,
        )


def _block(group: Group, name: str) -> NDArray[Any]:
    """(R, S, K) or (R, S, E), filled with what stands for nothing."""
    width = group.shape.num_experts if name == group.logits else group.shape.top_k
    dtype = np.int16 if name == group.experts else np.float32
    nothing = {group.experts: -1, group.weights: 0, group.logits: np.nan}[name]
    return np.full((ROW_GROUP, len(group.sites), width), nothing, dtype)


def _arrow(values: NDArray[Any], kind: Any) -> Any:
    if pa.types.is_fixed_size_list(kind):
        return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), type=kind)
    if pa.types.is_dictionary(kind):
        return pa.array(values, pa.string()).dictionary_encode()
    return pa.array(values, kind)


def _floats(values: Tensor, *, half: bool) -> NDArray[np.float32]:
    values = values.detach().to("cpu", torch.float32)
    array: NDArray[np.float32] = (values.half().float() if half else values).numpy()
    return array


def chunk_of(table: Any, layout: Layout, sites: Iterable[Site]) -> Chunk:
    """One row group read back, with decisions for these sites only.

    Raises:
        KeyError, ValueError: The table does not have the layout's columns.
    """
    wanted = frozenset(sites)
    decisions: dict[Site, Decision] = {}
    for group in layout.groups_of(wanted):
        decisions |= _decisions(table, group, wanted)
    in_order = {site: decisions[site] for site in layout.shapes if site in decisions}
    return Chunk(_tokens(table), in_order, _labels(table), _text(table))


def _tokens(table: Any) -> Tokens:
    def integers(name: str) -> Tensor:
        return torch.from_numpy(table[name].to_numpy().astype(np.int64))

    sample = integers("sample")
    known = "token_id" in table.column_names
    ids = integers("token_id") if known else torch.full_like(sample, -1)
    real = torch.from_numpy(table["real"].to_numpy().astype(bool))
    return Tokens(sample, integers("position"), ids, real)


def _labels(table: Any) -> dict[int, str]:
    if "label" not in table.column_names:
        return {}
    pairs = table.select(["sample", "label"]).group_by(["sample", "label"]).aggregate([])
    named = zip(pairs["sample"].to_pylist(), pairs["label"].to_pylist(), strict=True)
    return {sample: label for sample, label in named if label is not None}


def _text(table: Any) -> tuple[str, ...] | None:
    if "token" not in table.column_names or table["token"].null_count:
        return None
    return tuple(table["token"].to_pylist())


def _decisions(table: Any, group: Group, wanted: frozenset[Site]) -> dict[Site, Decision]:
    experts_NSK = _values(table, group.experts, len(group.sites), group.shape.top_k)
    weights_NSK = _values(table, group.weights, len(group.sites), group.shape.top_k)
    logits_NSE = (
        None if group.logits is None
        else _values(table, group.logits, len(group.sites), group.shape.num_experts)
    )  # fmt: skip
    return {
        site: Decision(
            torch.from_numpy(experts_NSK[:, slot].astype(np.int64)),
            torch.from_numpy(weights_NSK[:, slot].astype(np.float32)),
            group.shape.num_experts,
            None if logits_NSE is None else _logits(logits_NSE[:, slot]),
        )
        for slot, site in enumerate(group.sites)
        if site in wanted
    }


def _values(table: Any, name: str, sites: int, width: int) -> NDArray[Any]:
    flat = table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    values: NDArray[Any] = flat.reshape(len(table), sites, width)
    return values


def _logits(logits_NE: NDArray[Any]) -> Tensor | None:
    """NaN in all of a row group stands for logits that were not recorded."""
    return None if np.isnan(logits_NE).all() else torch.from_numpy(logits_NE.astype(np.float32))
