from __future__ import annotations

import pytest
import torch

from expertmix.experts.sieve import FEW, Sieve


def directions() -> torch.Tensor:
    return torch.randn(96, 40, generator=torch.Generator().manual_seed(1)) / 96**0.5


def inputs(tokens: int) -> torch.Tensor:
    return torch.randn(tokens, 96, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("tokens", [1, FEW, FEW + 1])
@pytest.mark.parametrize("columns", [slice(None), slice(8, 24)])
def test_products_are_near(small, tokens, columns):
    """Whatever is read, all products are within a percent or so of what float32 gives."""
    right, hidden = directions(), inputs(tokens)
    found = Sieve.of(right, small=small).project(hidden, columns)
    expected = hidden @ right[:, columns]
    assert found.dtype == torch.bfloat16
    assert found.shape == expected.shape
    assert float((found.float() - expected).norm() / expected.norm()) < 0.02


def test_scales_fit_each_direction():
    """Directions of any length keep all of int8's steps, and a null one is harmless."""
    right = directions() * torch.logspace(-6, 6, 40)
    right[:, 3] = 0
    hidden = inputs(2)
    found, expected = Sieve.of(right, small=True).project(hidden).float(), hidden @ right
    error = (found - expected).norm(dim=0) / expected.norm(dim=0)
    assert not found[:, 3].any()
    assert float(error[torch.arange(40) != 3].max()) < 0.1


def test_a_graph_is_kept():
    """Where gradients are wanted there is one, for few tokens too."""
    hidden = inputs(2).requires_grad_()
    sieve = Sieve.of(directions(), small=True)
    assert sieve.project(hidden).requires_grad
    with torch.no_grad():
        assert not sieve.project(hidden).requires_grad
