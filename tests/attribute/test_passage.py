"""Laws of passages: counts against a brute-force loop."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from expertmix.attribute.chain import passages
from expertmix.attribute.passage import PassageSums
from expertmix.core.site import Site, SiteInfo
from expertmix.core.trace import Trace


def sums(source: int, target: int) -> PassageSums:
    return PassageSums(SiteInfo(Site("a"), source, 2), SiteInfo(Site("b"), target, 2))


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 12), st.integers(0, 9))
def test_counts_are_pairs(experts: int, others: int, tokens: int, seed: int) -> None:
    """Every pair of calls of a token counts once, in any order of parts."""
    generator = torch.Generator().manual_seed(seed)
    source = torch.rand(tokens, experts, generator=generator) > 0.4
    target = torch.rand(tokens, others, generator=generator) > 0.4
    group = torch.arange(tokens) % 3
    whole, parts = sums(experts, others), sums(experts, others)
    whole.add(source, target, group)
    for token in range(tokens):
        parts.add(source[token : token + 1], target[token : token + 1], group[token : token + 1])
    one, other = whole.result(), parts.result()
    for i, j in product(range(experts), range(others)):
        assert one.counts[i, j] == sum(bool(source[n, i] & target[n, j]) for n in range(tokens))
    assert torch.equal(one.counts, other.counts)
    both = source.any(1) & target.any(1)
    assert one.tokens == int(both.sum())
    if experts == others and one.tokens:
        kept = (source & target)[both].sum() / source[both].sum()
        assert one.retention.value == pytest.approx(float(kept))
        assert other.retention.value == pytest.approx(float(kept))


def test_chances() -> None:
    """Even chance is K of E; at the load, favorites of both are met more often."""
    source = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0]]).bool()
    one = sums(4, 4)
    one.add(source, source, torch.zeros(2, dtype=torch.int64))
    found = one.result()
    assert found.chance == 0.5
    assert found.independent == pytest.approx((1 + 0.25 + 0.25) / 2)
    assert found.expected[0].tolist() == [2, 1, 1, 0]
    assert found.share[0].tolist() == [0.5, 0.25, 0.25, 0]
    assert found.lift[1, 1] == 2
    assert found.strongest(9) == [(1, 1), (2, 2)]


def test_nothing_counted() -> None:
    """Without tokens there is no share, and nobody follows anybody."""
    found = sums(3, 3).result()
    assert found.chance != found.chance
    assert found.independent != found.independent
    assert found.strongest(3) == []


def test_layers_too(traced: Callable[..., Trace]) -> None:
    """Any two sites can be looked at; retention only where the experts are equally many."""
    trace = traced([(4, 2), (6, 3)])
    found = passages(trace, [(trace.sites[0], trace.sites[1])])[0]
    real = trace.tokens.real
    source, target = (trace[site].chosen()[real].double() for site in trace.sites)
    assert torch.equal(found.counts.double(), source.T @ target)
    assert found.retention.value != found.retention.value
