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


@pytest.mark.parametrize("width", [1, 7, 33, 40, 100])
@pytest.mark.parametrize("count", [1, 3, 16])
def test_any_width_is_safe(width, count):
    """Widths that the int8 product would read beyond (NaN, a crash) are read in bfloat16."""
    generator = torch.Generator().manual_seed(1)
    right = torch.randn(count, width, generator=generator).T
    hidden = torch.randn(2, width, generator=generator)
    sieve = Sieve.of(right, small=True)
    assert sieve.small is None
    torch.testing.assert_close(sieve.project(hidden).float(), hidden @ right, rtol=0.05, atol=0.1)


def test_without_an_int8_product_there_is_bfloat16(monkeypatch):
    """The product is private to PyTorch: a version without it works too, whenever it is missed."""
    made = Sieve.of(directions(), small=True)
    assert made.small is not None
    monkeypatch.delattr(torch, "_weight_int8pack_mm")
    expected = Sieve.of(directions(), small=False).project(inputs(2))
    assert torch.equal(made.project(inputs(2)), expected)
    assert Sieve.of(directions(), small=True).small is None
