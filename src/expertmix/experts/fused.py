"""What the selected adapters add, from projections that are there already.

Two ways that give the same: *dense*, one product with all adapters' ways up, for few adapters; and
*gathered*, only the rows of the selected, for many. Two combinations: of *outputs*,
Σ w_i B*_i A*_i x, and of *aligned factors*, (Σ w_i B*_i)(Σ w_i A*_i) x, the authors' code, which
has cross terms between adapters. Nothing of size tokens × E × output exists at any time.

Differentiable in projections and weights. Knows neither routers nor models.

Legend: T tokens, E adapters, K selected, R directions of all, r the highest rank, n adapters of a
band, m width of the output.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from expertmix.experts.stack import Stack
from expertmix.routers.directions import Directions

Combination = Literal["outputs", "aligned"]
GATHER = 6
"""Gathered from so many times more directions than the selected have (measured, one CPU core)."""


def combine(
    stack: Stack, projected: Tensor, indices: Tensor, weights: Tensor, how: Combination
) -> Tensor:
    """What the selected adapters add to the module's output.

    Args:
        stack: The adapters of the module.
        projected: (T, R) of its input, of any floating type.
        indices: (T, K) selected adapters.
        weights: (T, K) of any floating type.
        how: Which combination.

    Returns:
        (T, m) in the type of the stack.
    """
    weights = weights.to(stack.up.dtype)
    selected = indices.shape[1] * stack.rows.shape[1]
    if len(stack.up) > GATHER * selected:
        return gathered(stack, projected, indices, weights, how)
    return dense(stack, projected, indices, weights, how)


def dense(
    stack: Stack, projected: Tensor, indices: Tensor, weights: Tensor, how: Combination
) -> Tensor:
    """One product with all ways up; those of adapters that are not selected meet zeros."""
    directions = stack.directions
    projected = projected.to(stack.up.dtype)
    experts = len(directions.names)
    dense_TE = weights.new_zeros(len(weights), experts).scatter_add(1, indices, weights)
    if how == "outputs" and directions.regular:
        (block_TEr,) = directions.blocks(projected)
        return (block_TEr * dense_TE[..., None]).flatten(1) @ stack.up
    shares_TR = dense_TE.index_select(1, directions.owner)
    if how == "aligned":
        projected = _spread_sum(directions, projected * shares_TR)
    return (projected * shares_TR) @ stack.up


def gathered(
    stack: Stack, projected: Tensor, indices: Tensor, weights: Tensor, how: Combination
) -> Tensor:
    """Weighted sums of the rows of the selected only."""
    rows_TKr = stack.rows[indices]
    rows_Tq = rows_TKr.flatten(1)
    chosen_Tq = projected.gather(1, rows_Tq).to(stack.up.dtype)
    coefficients_TKr = chosen_Tq.view_as(rows_TKr) * weights[..., None]
    if stack.filled is not None:
        coefficients_TKr = coefficients_TKr * stack.filled[indices]
    if how == "aligned":
        coefficients_TKr = coefficients_TKr.sum(1, keepdim=True) * weights[..., None]
        if stack.filled is not None:
            coefficients_TKr = coefficients_TKr * stack.filled[indices]
    return functional.embedding_bag(
        rows_Tq, stack.up, per_sample_weights=coefficients_TKr.flatten(1), mode="sum"
    )


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
