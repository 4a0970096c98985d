"""How much a neighbor counts."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from expertmix.errors import ConfigError
from expertmix.optimize.kernels import (
    KERNELS,
    Gaussian,
    Linear,
    Matern,
    Polynomial,
    kernel_of,
    weigh,
)

FORMULAS = {
    "gaussian": lambda r: math.exp(-r * r / 2),
    "matern12": lambda r: math.exp(-r),
    "matern": lambda r: (1 + math.sqrt(3) * r) * math.exp(-math.sqrt(3) * r),
    "matern32": lambda r: (1 + math.sqrt(3) * r) * math.exp(-math.sqrt(3) * r),
    "matern52": lambda r: (
        (1 + math.sqrt(5) * r + 5 * r * r / 3) * math.exp(-math.sqrt(5) * r)
    ),
}  # fmt: skip
rows = st.lists(st.floats(0.01, 2), min_size=1, max_size=6)


def one_row(kernel, distances, similarities=None):
    """Weights of a single sample."""
    distance = torch.tensor([distances], dtype=torch.float64)
    similarity = 1 - distance.square() / 2 if similarities is None else torch.tensor([similarities])
    return weigh(kernel, distance, similarity, torch.ones_like(distance, dtype=torch.bool))[0]


@pytest.mark.parametrize("name", FORMULAS)
@given(distances=rows)
def test_kernels_of_distance_are_their_formulas(name, distances):
    """Gaussian and Matérn weights are a float64 loop's, with the lower median as bandwidth."""
    h = sorted(distances)[(len(distances) - 1) // 2]
    raw = [FORMULAS[name](d / h) for d in distances]
    expected = torch.tensor([one / sum(raw) for one in raw])
    torch.testing.assert_close(one_row(KERNELS[name], distances), expected, rtol=1e-5, atol=1e-7)


@given(similarities=st.lists(st.floats(-1, 1), min_size=1, max_size=6))
def test_kernels_of_similarity_are_their_formulas(similarities):
    """Linear and polynomial weights are a float64 loop's; if all are 0, all count the same."""
    for kernel, formula in (
        (Linear(), lambda s: max(0.0, s)),
        (Polynomial(3, 0.5), lambda s: max(0.0, s + 0.5) ** 3),
    ):
        raw = [formula(torch.tensor(s).item()) for s in similarities]
        total = sum(raw)
        if 0 < total < 1e-30:
            continue
        expected = [one / total if total else 1 / len(raw) for one in raw]
        found = one_row(kernel, [1.0] * len(raw), similarities)
        torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-6)


def test_a_narrow_kernel_does_not_underflow():
    """However small the bandwidth, weights sum to 1, and the nearest has the most."""
    for kernel in (Gaussian(1e-4), Matern(1.5, 1e-4)):
        found = one_row(kernel, [1.0, 1.5, 2.0])
        torch.testing.assert_close(found, torch.tensor([1.0, 0, 0]))


def test_distances_of_zero_are_no_division_by_zero():
    """Where the median distance is 0, the neighbors at 0 share the weight."""
    for name in ("gaussian", "matern12", "matern32", "matern52"):
        torch.testing.assert_close(
            one_row(KERNELS[name], [0.0, 0.0, 1.0]), torch.tensor([0.5, 0.5, 0.0])
        )


def test_absent_neighbors_have_no_weight_and_no_say():
    """A row's weights do not depend on free slots nor on other rows; a row of nobody is 0."""
    distance = torch.tensor([[0.5, 1.0, torch.inf], [0.2, 0.3, 0.9], [torch.inf] * 3])
    present = distance.isfinite()
    similarity = torch.zeros(3, 3)
    for kernel in KERNELS.values():
        found = weigh(kernel, distance, similarity, present)
        alone = weigh(kernel, distance[:1, :2], similarity[:1, :2], present[:1, :2])
        torch.testing.assert_close(found[0], torch.cat([alone[0], torch.zeros(1)]))
        torch.testing.assert_close(found.sum(1), torch.tensor([1.0, 1.0, 0.0]))


def test_impossible_kernels_are_refused():
    """Unknown names, a bandwidth where there is none, senseless settings."""
    for make, words in (
        (lambda: kernel_of("cauchy"), "unknown kernel"),
        (lambda: kernel_of("linear", 0.3), "has no bandwidth"),
        (lambda: Gaussian(0.0), "above 0"),
        (lambda: Matern(2.0), "0.5, 1.5 or 2.5"),
        (lambda: Polynomial(0), "degree"),
    ):
        with pytest.raises(ConfigError, match=words):
            make()
    assert kernel_of("matern52", 0.3) == Matern(2.5, 0.3)
    assert kernel_of(Linear()) == Linear()
