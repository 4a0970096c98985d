"""Laws of chains, against planted truths."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from expertmix.attribute.chain import chains
from expertmix.attribute.mass import usage
from expertmix.core.trace import Trace

from .chained import chain_trace, random_route


def test_random_routing_keeps_by_chance() -> None:
    """Where iterations choose without regard to each other, retention is K of N, within error."""
    (layer,) = chains(chain_trace(random_route(80, 8, 2)))
    (one,) = layer.passages
    assert one.chance == pytest.approx(0.25)
    assert one.independent == pytest.approx(0.25, abs=0.01)
    assert one.retention.low < 0.25 < one.retention.high
    assert one.retention.high - one.retention.low < 0.1
    assert layer.skips == ()


def test_a_follower_is_found() -> None:
    """Expert 3 always follows expert 1: its share is 1, and it is the strongest pair."""

    def route(step, before, generator):
        random = torch.rand(60, 8, generator=generator).topk(1).indices
        return random if not step else torch.where(before[-1] == 1, 3, random)

    (layer,) = chains(chain_trace(route))
    (one,) = layer.passages
    assert one.share[1].tolist() == [0, 0, 0, 1, 0, 0, 0, 0]
    assert one.strongest(1) == [(1, 3)]
    assert one.lift[1, 3] > 3


def test_entries_and_accumulators() -> None:
    """Experts 0 and 1 work first, 6 and 7 last, the others all the time."""

    def route(step, before, generator):
        scores = torch.rand(60, 8, generator=generator)
        scores[:, [6, 7] if step == 0 else [0, 1]] = -1
        return scores.topk(3).indices

    (layer,) = chains(chain_trace(route))
    assert layer.entries == (0, 1)
    assert layer.accumulators == (6, 7)
    assert layer.first[0].value == 1
    assert layer.last[0].value == 0
    assert layer.dead == ()
    assert layer.iterations[0].total.dead == (6, 7)


def test_few_texts_make_nothing_clear() -> None:
    """Of two texts nothing is said to be clear, however long they are."""

    def route(step, before, generator):
        return torch.full((90, 1), 2 + step)

    (layer,) = chains(chain_trace(route, texts=2))
    assert layer.first[2].value == 1
    assert layer.entries == ()


def test_three_iterations() -> None:
    """Every iteration is compared with the next, and with the one after that."""

    def route(step, before, generator):
        return torch.arange(40)[:, None] % 2 + 2 * (step % 2)

    (layer,) = chains(chain_trace(route, steps=3))
    assert [one.retention.value for one in layer.passages] == [0, 0]
    assert [one.retention.value for one in layer.skips] == [1]
    assert [one.site.step for one in layer.iterations] == [0, 1, 2]
    assert layer.dead == (4, 5, 6, 7)


def test_hub() -> None:
    """The share of weight of the K busiest is told per iteration."""

    def route(step, before, generator):
        random = torch.rand(60, 8, generator=generator).topk(1).indices
        return torch.zeros_like(random) if step else random

    (layer,) = chains(chain_trace(route))
    assert layer.hub[1].value == 1
    assert layer.hub[0].value < 0.3


def test_an_iteration_that_did_not_run() -> None:
    """Iterations that never ran are left out; a layer with one left is no chain."""
    trace = chain_trace(random_route(20, 4, 1), steps=3, experts=4)
    last = trace.sites[-1]
    for chunk in trace._store.held:  # type: ignore[attr-defined]
        del chunk.decisions[last]
    (layer,) = chains(trace)
    assert len(layer.iterations) == 2
    assert len(layer.passages) == 1
    for chunk in trace._store.held:  # type: ignore[attr-defined]
        del chunk.decisions[trace.sites[1]]
    assert not chains(trace)


def test_usage_is_usage() -> None:
    """Load and entropy per iteration are those that `usage` counts."""
    trace = chain_trace(random_route(20, 4, 2), experts=4)
    counted = usage(trace)
    (layer,) = chains(trace)
    for one in layer.iterations:
        assert torch.equal(one.total.calls, counted[one.site].total.calls)
    assert torch.equal(layer.calls, sum(one.total.calls for one in counted))


def test_file_is_memory(tmp_path: Path) -> None:
    """Read from its file, in other parts, a trace says the same."""
    trace = chain_trace(random_route(20, 4, 2), experts=4, layers=("a.0.mlp", "a.1.mlp"))
    saved = Trace.load(trace.save(tmp_path / "trace.parquet"))
    for one, other in zip(chains(trace), chains(saved), strict=True):
        assert one.name == other.name
        assert torch.equal(one.passages[0].counts, other.passages[0].counts)
        assert one.passages[0].retention.low == pytest.approx(other.passages[0].retention.low)


def test_plain_layers_are_no_chains(traced: Callable[..., Trace]) -> None:
    """A trace of plain layers has none."""
    assert not chains(traced([(4, 2), (4, 2)]))
