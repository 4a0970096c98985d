"""What the selected adapters add, from the projections that a pass has, or needs now.

Two ways that give the same: *dense*, one product with all adapters' ways up, for few adapters; and
*sparse*, only with those of the selected, for many. Two combinations: of *outputs*,
Σ w_i B*_i A*_i x, and of *aligned factors*, (Σ w_i B*_i)(Σ w_i A*_i) x, the authors' code, which
has cross terms between adapters. Nothing of size tokens × E × output exists at any time.

Differentiable in the input and in the weights. Knows neither routers nor models.

Legend: T tokens, E adapters, K selected, R directions of all, r the highest rank, q = K * r, n
adapters of a band, m width of the output.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from expertmix.experts.stack import Stack
from expertmix.routers.directions import Directions
from expertmix.routers.seen import Seen

Combination = Literal["outputs", "aligned"]
SPARSE = 6
"""Sparse from so many times more directions than the selected have (measured, one CPU core)."""
TOKENS = 64
"""So many tokens or more go through the ways up block by block."""


def combine(stack: Stack, seen: Seen, indices: Tensor, weights: Tensor, how: Combination) -> Tensor:
    """What the selected adapters add to the module's output.

    Args:
        stack: The adapters of the module.
        seen: The pass there.
        indices: (T, K) selected adapters.
        weights: (T, K) of any floating type.
        how: Which combination.

    Returns:
        (T, m) in the type of the stack.
    """
    weights = weights.to(stack.up.dtype)
    selected = indices.shape[1] * stack.directions.rows.shape[1]
    way = sparse if stack.up.shape[1] > SPARSE * selected else dense
    return way(stack, seen, indices, weights, how)


def dense(stack: Stack, seen: Seen, indices: Tensor, weights: Tensor, how: Combination) -> Tensor:
    """One product with all ways up; those of adapters that are not selected meet zeros."""
    directions = stack.directions
    projected = seen.projected.to(stack.up.dtype)
    experts = len(directions.names)
    dense_TE = weights.new_zeros(len(weights), experts).scatter_add(1, indices, weights)
    if how == "outputs" and directions.regular:
        (block_TEr,) = directions.blocks(projected)
        inner_TR = (block_TEr * dense_TE[..., None]).flatten(1)
        return _product(inner_TR, stack.up)
    shares_TR = dense_TE.index_select(1, directions.owner)
    if how == "aligned":
        projected = _spread_sum(directions, projected * shares_TR)
    return _product(projected * shares_TR, stack.up)


def _product(inner_TR: Tensor, up: Tensor) -> Tensor:
    """(T, m) from (T, R) and the (b, R, w) ways up."""
    return torch.cat([inner_TR @ up_Rw for up_Rw in up], 1) if len(up) > 1 else inner_TR @ up[0]


def sparse(stack: Stack, seen: Seen, indices: Tensor, weights: Tensor, how: Combination) -> Tensor:
    """Weighted sums of the ways up of the selected only."""
    directions = stack.directions
    coefficients_TKr = seen.some(indices).to(stack.up.dtype) * weights[..., None]
    if how == "aligned":
        coefficients_TKr = coefficients_TKr.sum(1, keepdim=True) * weights[..., None]
        coefficients_TKr = directions.masked(coefficients_TKr, indices)
    rows_Tq = directions.rows[indices].flatten(1)
    return _sums(stack.up, rows_Tq, coefficients_TKr.flatten(1))


def _sums(up: Tensor, rows_Tq: Tensor, coefficients_Tq: Tensor) -> Tensor:
    """(T, m) sums of rows of the (b, R, w) ways up, by coefficients."""
    blocks, rows, _ = up.shape
    if len(rows_Tq) >= TOKENS and blocks > 1:
        return torch.cat([_bags(up_Rw, rows_Tq, coefficients_Tq) for up_Rw in up], 1)
    if blocks > 1:  # few tokens: one call, with a bag per token and block
        starts_b1 = torch.arange(0, blocks * rows, rows, device=up.device)[:, None]
        rows_Tq = (rows_Tq[:, None] + starts_b1).flatten(0, 1)
        coefficients_Tq = coefficients_Tq.repeat_interleave(blocks, 0)
    return _bags(up.flatten(0, 1), rows_Tq, coefficients_Tq).view(-1, blocks * up.shape[2])


def _bags(up: Tensor, rows: Tensor, coefficients: Tensor) -> Tensor:
    return functional.embedding_bag(rows, up, per_sample_weights=coefficients, mode="sum")


def _spread_sum(directions: Directions, values: Tensor) -> Tensor:
    """(T, R): for each adapter's first, second, … direction the sum over all adapters' own."""
    blocks = directions.blocks(values)
    width = max(band.rank for band in directions.bands)
    sums = [block_Tnr.sum(1) for block_Tnr in blocks]
    inner_Tr = torch.stack([functional.pad(one, (0, width - one.shape[1])) for one in sums]).sum(0)
    parts = [
        inner_Tr[:, None, : band.rank].expand(-1, len(band.experts), -1).flatten(1)
        for band in directions.bands
    ]
    return torch.cat(parts, 1)
