from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmix.errors import ConfigError
from expertmix.study.paired import Flips, flips, holm, mcnemar, mean_difference, wilson


@pytest.mark.parametrize("n", range(11))
def test_mcnemar_counts_all_ways_to_fall(n):
    """Its p is the share of all 2ⁿ outcomes that are at least as far from even as what was seen."""
    outcomes = [sum(way) for way in itertools.product((0, 1), repeat=n)]
    for gained in range(n + 1):
        far = abs(gained - n / 2)
        share = sum(abs(one - n / 2) >= far for one in outcomes) / len(outcomes)
        assert mcnemar(gained, n - gained) == pytest.approx(share, abs=1e-15)


def test_mcnemar_known_values():
    """Reference values of the exact binomial test; large counts neither overflow nor vanish."""
    assert mcnemar(0, 0) == 1
    assert mcnemar(1, 8) == pytest.approx(0.0390625)
    assert mcnemar(10, 2) == pytest.approx(0.03857421875)
    assert mcnemar(5000, 5000) == 1
    assert 0 < mcnemar(400, 600) < 1e-9
    with pytest.raises(ConfigError, match="needs counts"):
        mcnemar(-1, 3)


@given(st.lists(st.tuples(st.booleans(), st.booleans())))
def test_flips_are_a_table_of_all_items(pairs):
    """Every item is in one cell; swapping the runs swaps gained and lost."""
    before, after = [a for a, _ in pairs], [b for _, b in pairs]
    found = flips(before, after)
    assert found.both + found.gained + found.lost + found.neither == len(pairs)
    assert found.both + found.gained == sum(after)
    assert flips(after, before) == Flips(found.both, found.lost, found.gained, found.neither)
    assert found.p == mcnemar(found.gained, found.lost)


@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_ends_solve_its_equation(counts):
    """|share − π| = z √(π(1 − π)/n) at both ends, which stay in [0, 1] around the share."""
    right, total = counts
    found, z = wilson(right, total), 1.959963984540054
    assert 0 <= found.low <= found.value <= found.high <= 1
    for end in (found.low, found.high):
        gap = z * math.sqrt(end * (1 - end) / total)
        assert abs(found.value - end) == pytest.approx(gap, abs=1e-9)
    mirrored = wilson(total - right, total)
    assert mirrored.low == pytest.approx(1 - found.high)


def test_wilson_known_value():
    """Of the literature: 15 of 148 (Newcombe 1998): 0.0624 to 0.1605."""
    found = wilson(15, 148)
    assert (round(found.low, 4), round(found.high, 4)) == (0.0624, 0.1605)
    assert math.isnan(wilson(0, 0).value)
    with pytest.raises(ConfigError, match="cannot be right"):
        wilson(3, 2)


@given(st.lists(st.floats(0, 1), max_size=6))
def test_holm_against_its_definition(values):
    """The largest of (m − j + 1) p₍ⱼ₎ over all j up to i, at most 1; order does not matter."""
    given_p = {str(n): value for n, value in enumerate(values)}
    found = holm(given_p)
    ranked = sorted(values)
    for name, value in given_p.items():
        rank = max(i for i, one in enumerate(ranked) if one == value)
        expected = max(min(1, (len(ranked) - j) * ranked[j]) for j in range(rank + 1))
        assert found[name] == pytest.approx(expected)
        assert found[name] >= value
    assert list(found) == list(given_p)


def test_a_paired_interval_is_narrower_than_its_parts():
    """A constant shift has no doubt, however much the items differ."""
    before = [random.Random(n).random() * 100 for n in range(50)]
    shift = mean_difference(before, [one - 0.25 for one in before])
    assert shift.value == pytest.approx(-0.25)
    assert shift.low == pytest.approx(-0.25)
    assert shift.clear
    assert math.isnan(mean_difference([], []).value)
    with pytest.raises(ConfigError, match="cannot be paired"):
        mean_difference([1.0], [])


def test_the_bootstrap_is_drawn_from_its_seed():
    """The same seed gives the same interval, which covers the mean."""
    before, after = [0.0] * 30, [random.Random(n).gauss(0, 1) for n in range(30)]
    one, two = (mean_difference(before, after, seed=3) for _ in range(2))
    assert one == two
    assert one.low < one.value < one.high
