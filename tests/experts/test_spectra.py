from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from expertmix.experts.lora import Adapter, Factors
from expertmix.experts.spectra import decompose, decompose_adapter, decompose_adapters

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
    """Flipping A and B changes no bit; each v has a positive product with (cos 0, cos 1, …)."""
    given_ = factors(48, 32, 8, 1)
    found = decompose(given_)
    flipped = decompose(Factors(-given_.down, -given_.up, given_.scale))
    for name in ("left", "singular", "right"):
        assert torch.equal(getattr(found, name), getattr(flipped, name))
    assert (found.right @ torch.arange(32.0).cos() > 0).all()


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


def graded(rank: int, width: int, decades: float, seed: int) -> torch.Tensor:
    """(rank, width) float64 with singular values from 1 down by so many powers of ten."""
    generator = torch.Generator().manual_seed(seed)
    across, _ = torch.linalg.qr(torch.randn(width, rank, generator=generator, dtype=torch.float64))
    turn, _ = torch.linalg.qr(torch.randn(rank, rank, generator=generator, dtype=torch.float64))
    return (turn * torch.logspace(0, -decades, rank, dtype=torch.float64)) @ across.T


def in_float32(given_: Factors) -> tuple[torch.Tensor, ...]:
    """QR and SVD all in float32, as a plain implementation has it."""
    q_nk, r_kr = torch.linalg.qr(given_.down.T)
    q_mk, l_kr = torch.linalg.qr(given_.up)
    left, singular, right = torch.linalg.svd(given_.scale * (l_kr @ r_kr.T))
    return q_mk @ left, singular, right @ q_nk.T


@pytest.mark.parametrize("decades_up", [0, 2, 4, 6])
@pytest.mark.parametrize("decades_down", [0, 2, 4, 6, 8])
def test_ill_conditioned_factors_lose_nothing(decades_down, decades_up):
    """Against a float64 SVD of B A, never further off than QR and SVD in float32 are."""
    given_ = Factors(
        graded(8, 96, decades_down, 1).float(), graded(8, 64, decades_up, 2).T.float(), 2.0
    )
    exact = given_.scale * given_.up.double() @ given_.down.double()
    singular = torch.linalg.svdvals(exact)
    found, (_, plain, _) = decompose(given_), in_float32(given_)
    kept = found.rank
    assert kept
    assert (singular[kept:] < 1e-4 * singular[0]).all()
    error = (found.singular.double() - singular[:kept]).abs().max()
    assert error <= max((plain[:kept].double() - singular[:kept]).abs().max(), 2e-7 * singular[0])
    identity = torch.eye(kept)
    torch.testing.assert_close(found.right @ found.right.T, identity, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.left.T @ found.left, identity, atol=1e-6, rtol=0)
    assert (product(found).double() - exact).norm() < 2e-5 * exact.norm()


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_coarse_types_are_decomposed_as_the_values_they_hold(dtype):
    """Of bfloat16, float16 and float8 factors the spectrum is that of the same float32 numbers."""
    given_ = factors(48, 32, 8, 1)
    coarse = Factors(given_.down.to(dtype), given_.up.to(dtype), given_.scale)
    same = decompose(Factors(coarse.down.float(), coarse.up.float(), given_.scale))
    found = decompose(coarse)
    for name in ("left", "singular", "right"):
        assert torch.equal(getattr(found, name), getattr(same, name))


def test_it_does_not_matter_how_factors_lie_in_memory():
    """Transposed and strided factors give the same spectrum."""
    given_ = factors(48, 32, 8, 1)
    strided = torch.zeros(8, 64)
    strided[:, ::2] = given_.down
    other = Factors(strided[:, ::2], given_.up.T.contiguous().T, given_.scale)
    torch.testing.assert_close(decompose(other).right, decompose(given_).right)
    torch.testing.assert_close(decompose(other).left, decompose(given_).left)


def test_a_rank_above_its_width_is_found():
    """A of rank 8 over 4 inputs, and a zero A, have as many directions as the update has."""
    given_ = factors(48, 4, 8, 1)
    assert decompose(given_).rank == 4
    torch.testing.assert_close(product(decompose(given_)), 0.7 * given_.up @ given_.down)
    assert decompose(Factors(torch.zeros(8, 32), factors(48, 32, 8, 1).up, 1.0)).rank == 0


def test_neighbors_change_no_bit():
    """Adapters decomposed alone, together or in another order: the same bits, at any rank."""
    for rank in (1, 3, 4, 16):
        modules = [f"layers.{layer}.up_proj" for layer in range(5)]
        some = [
            random_adapter(str(seed), seed, modules, rank=rank, dtype=torch.float32)
            for seed in range(3)
        ]
        odd = Adapter("odd", {"up_proj": Factors(torch.zeros(rank, 8), torch.ones(8, rank), 1.0)})
        together = decompose_adapters([odd, *some])[1:]
        for spectra, adapter in zip(together, some, strict=True):
            for module, spectrum in decompose_adapter(adapter).modules.items():
                for name in ("singular", "left", "right"):
                    assert torch.equal(
                        getattr(spectrum, name), getattr(spectra.modules[module], name)
                    )
