from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from expertmix.errors import ConfigError
from expertmix.optimize.descent import NGD
from expertmix.optimize.leave_one_out import LeaveOneOut
from expertmix.optimize.oracle import WrongOracle
from expertmix.optimize.reference import ReferenceSet
from expertmix.optimize.regression import KernelRegression, Search
from expertmix.optimize.remix import remix
from expertmix.optimize.table import METHODS, line_of, method_of, schema, settings_of

from .problems import only, problem_of, reordered
from .world import open_suffix, samples

NEAR = [[0, 1, 2], [2, 3, -1], [4, 0, 1]]
WITH_NEIGHBORS = ("ngd", "kernel_regression", "leave_one_out", "adaptive")


@pytest.fixture(scope="module")
def problem():
    with open_suffix(shift=True) as suffix:
        yield problem_of(suffix, samples(3), samples(6, seed=1), NEAR)


def test_a_line_is_a_method():
    """Text is read as the type of its setting; a wrapped descent's settings are its own."""
    assert method_of("ngd steps=5 core=8") == NGD(steps=5, core=8)
    assert method_of("ngd core=none hard=true objective=choice") == NGD(
        core=None, hard=True, objective="choice"
    )
    assert method_of("kernel_regression alpha=0.5") == KernelRegression(Search(alpha=0.5))
    assert method_of("kernel_regression alpha=search") == KernelRegression()
    assert method_of("leave_one_out lr=0.1 rates=0.3,1") == LeaveOneOut(
        NGD(lr=0.1), rates=(0.3, 1.0)
    )
    assert method_of("wrong_oracle steps=3 seed=7") == WrongOracle(NGD(steps=3), seed=7)


def test_a_mapping_is_a_method_and_a_method_is_itself():
    """As a config file would have it."""
    assert method_of({"kind": "ngd", "steps": 5, "trust": 0.1}) == NGD(steps=5, trust=0.1)
    assert method_of(NGD()) == NGD()


@pytest.mark.parametrize("kind", METHODS)
def test_settings_and_lines_are_read_back(kind):
    """For each method, with its defaults and with another value."""
    method = method_of(kind)
    assert method.name == kind
    assert line_of(method) == kind
    assert method_of(settings_of(method)) == method
    key = next(one for one in ("steps", "grid") if one in schema(METHODS[kind]))
    other = method_of(f"{kind} {key}=7")
    assert line_of(other) == f"{kind} {key}=7"
    assert method_of(settings_of(other)) == other != method


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("ngdd", "did you mean 'ngd'"), ("ngd stepz=5", "did you mean 'steps'"),
        ("oracle stpes=5", "did you mean 'steps'"), ("ngd steps=five", "a whole number"),
        ("ngd steps=2.5", "a whole number"), ("ngd hard=maybe", "true or false"),
        ("ngd optimizer=sgd", "'gd', 'adam'"), ("ngd steps", "name=value"), ("", "no method"),
        ("ngd memo=3", "no setting 'memo'"), ("ngd lr=true", "a number"),
        ("global_delta memo=3", "no setting 'memo'"), ("leave_one_out rates=a", "numbers"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_line_is_said(line, said):
    """ConfigError, with the nearest name or the type that is wanted."""
    with pytest.raises(ConfigError, match=said):
        method_of(line)


def test_a_mapping_needs_a_kind():
    """ConfigError."""
    with pytest.raises(ConfigError, match="kind"):
        method_of({"steps": 5})


@pytest.mark.parametrize("kind", METHODS)
def test_samples_do_not_influence_each_other(kind, problem):
    """Every method: alone as in a batch, to 1e-4 in logits and 1e-5 in losses."""
    method = method_of(_quick(kind))
    together = method.solve(problem)
    for row in range(3):
        alone = method.solve(only(problem, row))
        assert alone.mode == together.mode == method.mode
        assert alone.changed[0] == together.changed[row]
        torch.testing.assert_close(alone.values[0], together.values[row], atol=1e-4, rtol=0)
        if together.losses is not None:
            torch.testing.assert_close(
                alone.losses[:, 0], together.losses[:, row], atol=1e-5, rtol=0, equal_nan=True
            )


@pytest.mark.parametrize("kind", METHODS)
def test_a_method_gives_the_same_twice(kind, problem):
    """Bit for bit, from a fresh method."""
    first, again = (method_of(_quick(kind)).solve(problem) for _ in range(2))
    assert torch.equal(first.values, again.values)
    assert torch.equal(first.changed, again.changed)


@pytest.mark.parametrize("kind", METHODS)
def test_what_a_method_gives_can_route(kind, problem):
    """No NaN, nothing infinitely likely, K experts left everywhere; notes are per sample."""
    found = method_of(_quick(kind)).solve(problem)
    assert not found.values.isnan().any()
    assert not torch.isposinf(found.values).any()
    assert (found.values.isfinite().sum(-1) >= 3).all()
    assert not found.values.requires_grad
    assert all(len(note) == 3 for note in found.notes.values())


@pytest.mark.parametrize("kind", WITH_NEIGHBORS)
def test_the_order_of_neighbors_changes_nothing(kind, problem):
    """To rounding: 1e-3 in logits, for Adam divides small gradients by each other."""
    method = method_of(_quick(kind))
    first, again = (method.solve(one) for one in (problem, reordered(problem, [1, 2, 0])))
    torch.testing.assert_close(first.values, again.values, atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", WITH_NEIGHBORS)
def test_without_neighbors_the_base_is_kept_bit_for_bit(kind, problem):
    """Nothing is changed, and values are the start."""
    lonely = replace(problem, neighbors=replace(
        problem.neighbors, indices=problem.neighbors.indices[:, :0],
        weights=problem.neighbors.weights[:, :0],
    ))  # fmt: skip
    found = method_of(_quick(kind)).solve(lonely)
    assert not found.changed.any()
    assert torch.equal(found.values, problem.start)


@pytest.mark.parametrize("kind", [one for one in METHODS if one != "kernel_regression"])
def test_without_steps_the_base_is_kept_bit_for_bit(kind, problem):
    """Nothing is changed."""
    found = method_of(f"{kind} steps=0").solve(problem)
    assert not found.changed.any()
    want = problem.start if found.mode == "set" else torch.zeros_like(found.values)
    assert torch.equal(found.values, want)


@pytest.mark.parametrize("kind", [one for one in METHODS if not METHODS[one].needs_labels])
def test_only_oracles_look_at_the_labels_of_test_samples(kind, problem):
    """Without them the result is the same, bit for bit."""
    blind = replace(problem, samples=[replace(one, gold=None) for one in problem.samples])
    first, again = (method_of(_quick(kind)).solve(one) for one in (problem, blind))
    assert torch.equal(first.values, again.values)


@pytest.mark.parametrize("kind", METHODS)
def test_every_method_works_with_kept_references(kind, problem):
    """Through `remix`, on a built reference set: scores are finite, and some routing is another."""
    reference = ReferenceSet.build(problem.pathways, samples(24, seed=1))
    found = remix(problem.pathways, samples(4), reference, method_of(_quick(kind)), batch_size=3)
    assert all(bool(one.hard.isfinite().all()) for one in found.outcomes)
    if kind not in ("kernel_regression", "mode_finding", "leave_one_out"):  # these may decline
        assert all(one.changed for one in found.outcomes)


def _quick(kind: str) -> str:
    steps = "" if kind == "kernel_regression" else " steps=3"
    return f"{kind}{steps}"
