from __future__ import annotations

import pytest
import torch
from experts.world import random_adapter, zero

from expertmix.errors import ConfigError
from expertmix.routers.fixed import Fixed
from expertmix.routers.oracle import Oracle

from .test_scores import dense
from .world import hidden_states, seen_of

ADAPTERS = [random_adapter("a", 1), random_adapter("b", 2), zero(random_adapter("c", 3))]


def test_fixed_gives_the_given_weights():
    """One name is weight one; a mapping gives its weights, which need not add up to one."""
    hidden = hidden_states()
    assert dense(Fixed("b"), ADAPTERS, hidden).unique(dim=0).tolist() == [[0, 1, 0]]
    found = dense(Fixed({"b": 0.5, "a": 1.5}), ADAPTERS, hidden)
    torch.testing.assert_close(found, torch.tensor([1.5, 0.5, 0.0]).expand(11, 3))
    assert Fixed({"a": 1.0}) == Fixed([("a", 1.0)]) == Fixed("a")


def test_an_adapter_that_does_nothing_gets_no_weight():
    """Fixed and Oracle give weight zero where the named adapter is absent or untrained."""
    hidden = hidden_states()
    assert not dense(Fixed("c"), ADAPTERS, hidden).any()
    assert not dense(Oracle(("c",)), ADAPTERS, hidden).any()


def test_the_oracle_follows_the_rows_of_the_batch():
    """Each row's tokens get that row's adapter."""
    found = dense(Oracle(("b", "a")), ADAPTERS, hidden_states(10), rows=2)
    assert found.tolist() == [[0, 1, 0]] * 5 + [[1, 0, 0]] * 5


def test_what_cannot_be():
    """Unknown names, weights not above zero, nothing at all, and another batch are refused."""
    impossible = ({}, {"a": 0.0}, {"a": float("nan")}, {"a": "much"}, {"a": True}, None, 3, ["a"])
    for weights in (*impossible, [("a", 1.0), ("a", 2.0)]):
        with pytest.raises(ConfigError):
            Fixed(weights)
    for adapters in ("a", ()):
        with pytest.raises(ConfigError):
            Oracle(adapters)
    for router in (Fixed("x"), Oracle(("x",))):
        with pytest.raises(ConfigError, match="no adapter 'x' on the shelf; it has a, b"):
            router.check(("a", "b"), ("up",))
    with pytest.raises(ConfigError, match="2 rows, the batch has 1"):
        Oracle(("a", "b")).scores(seen_of(ADAPTERS, hidden_states()))
