from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from expertmix.experts.lora import Factors
from expertmix.experts.spectra import decompose, decompose_adapter

from .world import random_adapter

SIZES = st.integers(1, 12)


def factors(out: int, width: int, rank: int, seed: int, scale: float = 0.7) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return Factors(
        torch.randn(rank, width, generator=generator),
        torch.randn(out, rank, generator=generator),
        scale,
    )


def product(spectrum) -> torch.Tensor:
    return (spectrum.left * spectrum.singular) @ spectrum.right


@given(SIZES, SIZES, SIZES, st.integers(0, 99), st.sampled_from([0.7, -1.5]))
def test_the_aligned_pair_is_the_update(out, width, rank, seed, scale):
    """B* A* = scale B A, for any shape, a rank above both sides and a negative scale too."""
    given_ = factors(out, width, rank, seed, scale)
    expected = scale * given_.up.double() @ given_.down.double()
    found = decompose(given_)
    assert found.shape == (out, width)
    torch.testing.assert_close(product(found).double(), expected, atol=1e-4, rtol=1e-4)


@given(SIZES, SIZES, SIZES, st.integers(0, 99))
def test_singular_values_and_vectors_are_those_of_a_full_svd(out, width, rank, seed):
    """The same singular values as a float64 SVD of B A, falling; both sides orthonormal."""
    given_ = factors(out, width, rank, seed)
    found = decompose(given_)
    exact = torch.linalg.svdvals(given_.scale * given_.up.double() @ given_.down.double())
    torch.testing.assert_close(found.singular.double(), exact[: found.rank], atol=1e-4, rtol=1e-4)
    assert (exact[found.rank :] < 1e-4 * exact[0]).all()
    assert (found.singular.diff() <= 0).all()
    identity = torch.eye(found.rank)
    torch.testing.assert_close(found.right @ found.right.T, identity, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.left.T @ found.left, identity, atol=1e-5, rtol=0)


def test_signs_are_canonical():
    """Flipping the signs of A and of B changes nothing; the largest entry of each v is positive."""
    given_ = factors(48, 32, 8, 1)
    found = decompose(given_)
    flipped = decompose(Factors(-given_.down, -given_.up, given_.scale))
    for name in ("left", "singular", "right"):
        torch.testing.assert_close(getattr(found, name), getattr(flipped, name))
    assert (found.right.gather(1, found.right.abs().argmax(1, keepdim=True)) > 0).all()


def test_it_is_deterministic():
    """The same factors give the same bits, time after time."""
    first, second = decompose(factors(48, 32, 8, 1)), decompose(factors(48, 32, 8, 1))
    assert torch.equal(first.right, second.right)
    assert torch.equal(first.left, second.left)


def test_null_directions_are_dropped():
    """A rank-8 adapter that uses three directions has three; none for B = 0 or alpha = 0."""
    wide = factors(48, 32, 3, 1)
    mix = torch.randn(3, 8, generator=torch.Generator().manual_seed(2))
    lazy = Factors(mix.T @ wide.down, wide.up @ mix, 1.0)
    assert decompose(lazy).rank == 3
    assert decompose(Factors(wide.down, torch.zeros_like(wide.up), 1.0)).rank == 0
    assert decompose(Factors(wide.down, wide.up, 0.0)).rank == 0
    torch.testing.assert_close(product(decompose(lazy)), lazy.up @ lazy.down, atol=1e-3, rtol=1e-4)


def test_tiny_directions_are_kept():
    """A direction a thousand times weaker than the first is not null."""
    given_ = factors(48, 32, 2, 1)
    q, _ = torch.linalg.qr(given_.down.T)
    u, _ = torch.linalg.qr(given_.up)
    found = decompose(Factors(q.T, u * torch.tensor([1.0, 1e-3]), 1.0))
    torch.testing.assert_close(found.singular, torch.tensor([1.0, 1e-3]), rtol=1e-3, atol=0)


def test_half_precision_is_decomposed_in_float32():
    """A bfloat16 adapter gets float32 spectra of exactly its own values; float64 stays float64."""
    given_ = factors(48, 32, 8, 1)
    half = Factors(given_.down.bfloat16(), given_.up.bfloat16(), given_.scale)
    found = decompose(half)
    assert found.right.dtype == torch.float32
    expected = half.scale * half.up.double() @ half.down.double()
    torch.testing.assert_close(product(found).double(), expected, atol=1e-4, rtol=1e-4)
    fine = decompose(Factors(given_.down.double(), given_.up.double(), given_.scale))
    assert fine.right.dtype == torch.float64


def test_the_hash_follows_the_weights():
    """Equal factors have equal hashes; another scale, value or module name has another."""
    adapter = random_adapter("a", 1)
    assert random_adapter("b", 1).digest == adapter.digest
    assert decompose_adapter(adapter).digest == adapter.digest
    others = [
        random_adapter("a", 2), random_adapter("a", 1, scale=1.0),
        random_adapter("a", 1, ["mlp.gate_proj"]), random_adapter("a", 1, dtype=torch.bfloat16),
    ]  # fmt: skip
    assert len({adapter.digest, *(other.digest for other in others)}) == 5
