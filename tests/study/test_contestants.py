from __future__ import annotations

import pytest

from expertmix.errors import ConfigError
from expertmix.study.contestants import contestants


def test_every_method_has_its_controls():
    """Random neighbors and shuffled labels beside each; the others once."""
    runs = contestants("ngd steps=5", ["kernel_regression"], seed=4)
    assert [(one.name, one.kind) for one in runs] == [
        ("base", "base"),
        ("ngd steps=5", "method"),
        ("kernel_regression", "method"),
        ("ngd steps=5, random neighbors", "control"),
        ("ngd steps=5, shuffled labels", "control"),
        ("kernel_regression, random neighbors", "control"),
        ("kernel_regression, shuffled labels", "control"),
        ("neighbor vote", "control"),
        ("in-context learning", "control"),
        ("global_delta", "control"),
        ("oracle", "bound"),
        ("wrong_oracle", "bound"),
    ]
    assert len({one.file for one in runs}) == len(runs)
    assert all(one.seed == 4 for one in runs if "," in one.name)


def test_a_method_that_looks_for_no_neighbors_has_no_random_ones():
    """Nor shuffled labels where it needs none; a bound that is named is still no method."""
    names = {one.name for one in contestants("context", ["mode_finding", "oracle steps=2"])}
    assert "context, random neighbors" not in names
    assert "context, shuffled labels" not in names
    assert "mode_finding, random neighbors" not in names
    assert "mode_finding, shuffled labels" in names
    kinds = {one.name: one.kind for one in contestants("ngd", ["oracle steps=2"])}
    assert kinds["oracle steps=2"] == "bound"


def test_without_controls_only_what_is_named_runs():
    """The base first."""
    assert [one.name for one in contestants("ngd", controls=False)] == ["base", "ngd"]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (("ndg",), "did you mean 'ngd'"),
        (("ngd step=3",), "no setting 'step'"),
        (("ngd", "ngd"), "named twice"),
        (("ngd", "ngd steps=10"), "named twice"),
    ],
)
def test_wrong_methods_are_refused(lines, said):
    """Unknown ones, unknown settings, and one that would be compared with itself."""
    with pytest.raises(ConfigError, match=said):
        contestants(lines[0], lines[1:])


def test_a_line_tells_settings_apart():
    """What decides the outcome is in it."""
    lines = {
        one.line
        for line in ("ngd", "ngd steps=5")
        for seed in (0, 1)
        for one in contestants(line, seed=seed)
        if one.twist == "random neighbors"
    }
    assert len(lines) == 4
