"""Questions with what is known of them."""

from __future__ import annotations

import pytest
import torch

from expertmix.core.pathway import Question
from expertmix.errors import ConfigError
from expertmix.optimize.samples import Sample, scores

QUESTION = Question((1, 2), ((3,), (4, 5), (6,)))


def test_scores_are_sums_divided_by_units():
    """Each option's log-probability over its units; options that are not there never win."""
    logprobs = torch.tensor([[[-1.0, 0], [-2, -4], [-3, 0]], [[-5.0, 0], [0, 0], [0, 0]]])
    two = [Sample(QUESTION, units=(1.0, 3.0, 0.5)), Sample(Question((1,), ((3,),)))]
    inf = float("inf")
    expected = torch.tensor([[-1.0, -2, -6], [-5, -inf, -inf]])
    torch.testing.assert_close(scores(logprobs, two), expected)


def test_samples_that_contradict_themselves_are_refused():
    """A right option that is not there; units that do not fit."""
    for settings, words in (
        ({"gold": 3}, "option 3 is right, but it has 3"), ({"gold": -1}, "option -1"),
        ({"units": (1.0, 2.0)}, "one number above 0 per option"),
        ({"units": (1.0, 0.0, 2.0)}, "one number above 0 per option"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            Sample(QUESTION, name="x", **settings)
