from __future__ import annotations

import math

import numpy as np
import pytest

from expertmix.study.bootstrap import Draws, estimate, ratio


def test_the_value_is_that_of_the_texts_as_they_are():
    """And the interval is around it, narrower with more texts."""
    random = np.random.default_rng(0)
    widths = []
    for texts in (20, 500):
        losses, tokens = random.normal(2, 1, texts), np.full(texts, 1.0)
        found = estimate(ratio(*Draws(texts).sums(losses, tokens)), texts)
        assert found.value == pytest.approx(losses.mean())
        assert found.low < found.value < found.high
        widths.append(found.high - found.low)
    assert widths[1] < widths[0] / 2


def test_the_interval_is_that_of_the_normal_approximation():
    """For a mean of many texts of equal length: 1.96 standard errors each way."""
    values = np.random.default_rng(1).normal(0, 1, 1000)
    found = estimate(ratio(*Draws(1000).sums(values, np.ones(1000))), 1000)
    error = values.std() / math.sqrt(1000)
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.3 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.3 * error)


def test_equal_runs_differ_by_nothing_for_sure():
    """The same draws serve both: what makes a difference paired."""
    draws = Draws(7)
    values, ones = list(range(7)), [1.0] * 7
    one, other = (ratio(*draws.sums(values, ones)) for _ in range(2))
    found = estimate(one - other + 0.5, 7)
    assert (found.value, found.low, found.high) == (0.5, 0.5, 0.5)
    assert found.clear


def test_the_same_seed_gives_the_same_draws():
    """Another seed others."""
    values = list(range(9))
    first, again, other = (Draws(9, 5, seed).sums(values)[0] for seed in (0, 0, 1))
    assert first.tolist() == again.tolist() != other.tolist()


@pytest.mark.parametrize("values", [[], [3.0]])
def test_of_one_text_or_none_no_interval_can_be_told(values):
    """Its ends are nan, never a number that looks like a finding."""
    found = estimate(ratio(*Draws(len(values)).sums(values, [1.0] * len(values))), len(values))
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert not found.clear
    assert math.isnan(found.value) if not values else found.value == 3
