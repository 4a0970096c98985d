from __future__ import annotations

import pytest
import torch

from expertmix.errors import ConfigError
from expertmix.routers.arrow import Arrow
from expertmix.routers.lag import Lag
from expertmix.routers.rule import Rule
from expertmix.routers.spectr import SpectR

SCORES = torch.tensor([[1.0, 3.0, 2.0, -1.0]])


def test_weights_of_the_selected():
    """uniform is 1 / K, softmax is over the K alone, given is exp(score)."""
    for weights, expected in (
        ("uniform", [[0.5, 0.5]]),
        ("softmax", torch.softmax(torch.tensor([[1.5, 1.0]]), 1).tolist()),
        ("given", [[torch.e**3, torch.e**2]]),
    ):
        rule = Rule(2, weights, 2.0)
        chosen = rule.select(SCORES, 2)
        assert chosen.tolist() == [[1, 2]]
        torch.testing.assert_close(rule.weigh(SCORES.gather(1, chosen)), torch.tensor(expected))


@pytest.mark.parametrize("weights", ["uniform", "softmax", "given"])
def test_probabilities_say_what_scores_say(weights):
    """Going to probabilities and back changes neither order nor weights."""
    rule = Rule(2, weights, 0.7)
    back = rule.scores(rule.probabilities(SCORES))
    assert torch.equal(rule.select(back, 2), rule.select(SCORES, 2))
    torch.testing.assert_close(rule.weigh(back[:, 1:3]), rule.weigh(SCORES[:, 1:3]))
    assert torch.isneginf(rule.scores(torch.tensor([[-0.1, 0.0]]))).all()


def test_all_of_them_come_in_their_own_order():
    """Selecting everybody sorts nobody."""
    assert Rule(None).select(SCORES, 4).tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Rule(0), lambda: Rule(1.5), lambda: Rule(True), lambda: Rule(1, "sum"),
        lambda: Rule(1, "softmax", 0.0), lambda: Rule(1, "softmax", float("nan")),
        lambda: SpectR("cosine"), lambda: SpectR(top_k=0), lambda: SpectR(weights="given"),
        lambda: SpectR(normalize=("length",)), lambda: Arrow(weights="given"),
        lambda: Arrow(temperature=-1), lambda: Lag(m=2, top_k=3), lambda: Lag(top_k=None),
        lambda: Lag(m=2.5), lambda: Lag(m="a"), lambda: Lag(m=True),
    ],
)  # fmt: skip
def test_impossible_values_are_config_errors(make):
    """What cannot be is refused when the router is made, not when it runs."""
    with pytest.raises(ConfigError):
        make()
