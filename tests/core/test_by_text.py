"""Laws of ratios over texts."""

from __future__ import annotations

import math

import pytest
import torch

from expertmix.core.by_text import FEWEST, GROUPS, _student, group_of, ratio, ratios


def test_a_ratio_is_the_ratio_of_sums() -> None:
    """Long texts count for more."""
    found = ratio(torch.tensor([1.0, 30.0]), torch.tensor([10.0, 40.0]))
    assert found.value == pytest.approx(31 / 50)


def test_no_interval_from_few_texts() -> None:
    """Fewer texts than `FEWEST` give a value and no interval; texts without tokens do not count."""
    for texts in range(1, FEWEST + 1):
        top, bottom = torch.arange(texts).double(), torch.full((texts,), 9.0)
        padded = torch.cat([bottom, torch.zeros(5)])
        found = ratio(torch.cat([top, torch.zeros(5)]), padded)
        assert math.isnan(found.low) == (texts < FEWEST)


def test_nothing_is_nan() -> None:
    """Without tokens there is no number."""
    found = ratio(torch.zeros(8), torch.zeros(8))
    assert math.isnan(found.value)
    assert math.isnan(found.low)


def test_equal_texts_are_the_t_interval_of_a_mean() -> None:
    """Of texts of one length, the interval is Student's for the mean of the texts."""
    top = torch.tensor([3.0, 5.0, 4.0, 8.0, 6.0, 4.0], dtype=torch.float64)
    found = ratio(top, torch.full((6,), 10.0))
    reach = 2.570582 * float(top.std() / 10) / math.sqrt(6)
    assert found.high - found.value == pytest.approx(reach, rel=2e-3)
    assert found.value - found.low == pytest.approx(reach, rel=2e-3)


@pytest.mark.parametrize(("freedom", "quantile"), [(5, 2.570582), (10, 2.228139), (255, 1.969315)])
def test_student(freedom: int, quantile: float) -> None:
    """The expansion is Student's quantile."""
    assert _student(freedom) == pytest.approx(quantile, abs=0.005)


def test_intervals_cover() -> None:
    """About 95 % of intervals hold the truth where tokens of a text are alike."""
    generator = torch.Generator().manual_seed(0)
    texts, runs = 20, 1500
    rate = 0.2 + 0.6 * torch.rand(texts, runs, generator=generator)  # a text's own
    bottom = torch.randint(20, 60, (texts, runs), generator=generator).double()
    found = ratios((rate * bottom).round(), bottom)
    covered = sum(one.low <= 0.5 <= one.high for one in found) / runs
    assert 0.92 <= covered <= 0.97


def test_many_texts_share_groups() -> None:
    """A text is always in the same of a bounded number of groups."""
    group = group_of(torch.arange(3 * GROUPS))
    assert int(group.max()) == GROUPS - 1
    assert torch.equal(group[:GROUPS], group[GROUPS : 2 * GROUPS])
