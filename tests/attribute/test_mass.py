"""Laws of counting: what `usage` says is what a slow loop in float64 says."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmix.attribute import Tally, Usage, UsageCounter, mass, pool, usage
from expertmix.core.decision import Decision
from expertmix.core.site import Site
from expertmix.core.tokens import Tokens
from expertmix.core.trace import Chunk, Memory, Trace
from expertmix.errors import TraceError

from .conftest import make_infos, make_trace, random_chunk

shapes = st.integers(1, 9).flatmap(lambda e: st.tuples(st.just(e), st.integers(1, e)))


def loop(trace: Trace, site: Site, label: str | None = None) -> dict[str, object]:
    """The definitions, token by token in Python floats."""
    experts = trace.info(site).num_experts
    calls, top1, weight, share = ([0.0] * experts for _ in range(4))
    tokens = routed = 0
    entropy = logit_entropy = 0.0
    for chunk in trace.chunks():
        decision = chunk.decisions[site]
        for row in range(len(chunk.tokens)):
            sample = int(chunk.tokens.sample[row])
            if not chunk.tokens.real[row] or (label and chunk.labels.get(sample) != label):
                continue
            tokens += 1
            slots = zip(decision.indices[row].tolist(), decision.weights[row].tolist(), strict=True)
            given = {expert: value for expert, value in slots if expert >= 0 and value != 0}
            assert decision.logits is not None
            odds = [math.exp(value) for value in decision.logits[row].tolist()]
            logit_entropy -= sum(o / sum(odds) * math.log(o / sum(odds)) for o in odds)
            if not given:
                continue
            routed += 1
            total = sum(abs(value) for value in given.values())
            top1[max(given, key=lambda expert: abs(given[expert]))] += 1
            for expert, value in given.items():
                calls[expert] += 1
                weight[expert] += value
                share[expert] += abs(value) / total
                entropy -= abs(value) / total * math.log(abs(value) / total)
    return {
        "tokens": tokens, "routed": routed, "calls": calls, "top1": top1, "weight": weight,
        "share": share, "entropy_sum": entropy, "logit_entropy_sum": logit_entropy,
    }  # fmt: skip


def assert_tally(tally: Tally, expected: dict[str, object]) -> None:
    for name, value in expected.items():
        found = getattr(tally, name)
        found = found.tolist() if isinstance(found, torch.Tensor) else found
        assert found == pytest.approx(value, rel=1e-9, abs=1e-9), name


def assert_same(one: Usage, two: Usage) -> None:
    assert (one.tokens, one.samples, one.labels) == (two.tokens, two.samples, two.labels)
    for left, right in zip(one.sites, two.sites, strict=True):
        assert torch.equal(left.coactivation, right.coactivation)
        for label in (None, *one.labels):
            assert torch.equal(left.tally(label).calls, right.tally(label).calls)
            assert torch.equal(left.tally(label).top1, right.tally(label).top1)
            torch.testing.assert_close(left.tally(label).weight, right.tally(label).weight)
            torch.testing.assert_close(left.tally(label).share, right.tally(label).share)
            assert left.tally(label).entropy_sum == pytest.approx(right.tally(label).entropy_sum)
    for before, after in zip(one.transitions, two.transitions, strict=True):
        assert torch.equal(before.counts, after.counts)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(shapes, min_size=1, max_size=3), st.lists(st.integers(0, 12), min_size=1, max_size=3)
)
def test_loop(sites: list[tuple[int, int]], lengths: list[int]) -> None:
    """For sites of any shape and chunks of any length, every sum is that of the loop."""
    infos = make_infos(*sites)
    trace = make_trace(infos, [random_chunk(infos, n, n + 7) for n in lengths])
    if not any(bool(chunk.tokens.real.any()) for chunk in trace.chunks()):
        with pytest.raises(TraceError, match="empty"):
            usage(trace)
        return
    counted = usage(trace)
    for info in infos:
        assert_tally(counted[info.site].total, loop(trace, info.site))
        for label in counted.labels:
            assert_tally(counted[info.site].tally(label), loop(trace, info.site, label))


def test_means(traced: Callable[..., Trace]) -> None:
    """Frequency sums to calls per token, first choice and normalized mass to the routed share."""
    tally = usage(traced([(6, 3)], (200,))).sites[0].total
    assert float(tally.frequency.sum()) == pytest.approx(int(tally.calls.sum()) / tally.tokens)
    assert float(tally.first_choice.sum()) == pytest.approx(tally.routed / tally.tokens)
    assert float(tally.normalized_mass.sum()) == pytest.approx(tally.routed / tally.tokens)
    assert float(tally.load.sum()) == pytest.approx(1)
    assert 0 <= tally.entropy <= math.log(3)
    assert 0 <= tally.router_entropy <= math.log(6)
    assert tally.dead == ()


def test_permuting_experts_permutes_columns(traced: Callable[..., Trace]) -> None:
    """Renumbering the experts renumbers every result, and changes nothing else."""
    trace = traced([(5, 2), (5, 2)], (60, 9))
    order = torch.randperm(5)
    new_number = torch.cat([order.argsort(), torch.tensor([-1])])  # the last entry serves -1

    def renumber(decision: Decision) -> Decision:
        assert decision.logits is not None
        indices, logits = new_number[decision.indices], decision.logits[:, order]
        return Decision(indices, decision.weights, 5, logits)

    chunks = [
        replace(chunk, decisions={site: renumber(one) for site, one in chunk.decisions.items()})
        for chunk in trace.chunks()
    ]
    before, after = usage(trace), usage(make_trace(trace.meta.sites, chunks))
    for old, new in zip(before.sites, after.sites, strict=True):
        for name in ("calls", "top1", "weight", "share"):
            torch.testing.assert_close(getattr(old.total, name)[order], getattr(new.total, name))
        assert torch.equal(old.coactivation[order][:, order], new.coactivation)
        assert old.total.balance == pytest.approx(new.total.balance)
        assert old.total.centralization == pytest.approx(new.total.centralization)
    moves = before.transitions[0].counts
    assert torch.equal(moves[order][:, order], after.transitions[0].counts)


def test_padding_changes_nothing(traced: Callable[..., Trace]) -> None:
    """A trace without its padding rows counts the same."""
    trace = traced([(7, 2), (4, 1)], (40, 13))
    chunks = []
    for chunk in trace.chunks():
        real = chunk.tokens.real
        decisions = {site: one.rows(real) for site, one in chunk.decisions.items()}
        chunks.append(replace(chunk, tokens=chunk.tokens.rows(real), decisions=decisions))
    assert_same(usage(trace), usage(make_trace(trace.meta.sites, chunks)))


def test_chunking_changes_nothing(
    traced: Callable[..., Trace], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long and short chunks, and blocks of any size, give the same counts."""
    trace = traced([(7, 2), (4, 1)], (50,))
    (whole,) = trace.chunks()
    parts = []
    for rows in torch.arange(50).split(7):
        decisions = {site: one.rows(rows) for site, one in whole.decisions.items()}
        parts.append(replace(whole, tokens=whole.tokens.rows(rows), decisions=decisions))
    expected = usage(trace)
    assert_same(expected, usage(make_trace(trace.meta.sites, parts)))
    monkeypatch.setattr(mass, "_BLOCK", 3)
    assert_same(expected, usage(trace))


def test_file_is_memory(traced: Callable[..., Trace], tmp_path: Path) -> None:
    """A trace read back from its file counts as it did in memory."""
    pytest.importorskip("expertmix.core.parquet")
    trace = traced([(7, 2), (7, 2)], (40, 13))
    assert_same(usage(trace), usage(Trace.load(trace.save(tmp_path / "trace.parquet"))))


def test_reads_the_trace_once(traced: Callable[..., Trace]) -> None:
    """`usage` makes one pass over the store."""

    class Counting(Memory):
        passes = 0

        def chunks(self, sites):  # type: ignore[no-untyped-def]
            self.passes += 1
            return super().chunks(sites)

    trace = traced([(7, 2), (4, 1)])
    store = Counting(list(trace.chunks()))
    usage(Trace(trace.meta, store))
    assert store.passes == 1


def test_coactivation_and_transitions(traced: Callable[..., Trace]) -> None:
    """Co-activation is the Gram matrix of calls; transitions count pairs of top-1 experts."""
    trace = traced([(5, 2), (6, 3), (4, 1)], (80,))
    (chunk,) = trace.chunks()
    counted = usage(trace)
    first = {}
    for site in counted:
        decision = chunk.decisions[site.site].rows(chunk.tokens.real)
        called = decision.chosen().to(torch.int64)
        first[site.site] = mass.top1(decision)
        assert torch.equal(site.coactivation, called.T @ called)
        assert torch.equal(site.coactivation.diagonal(), site.total.calls)
    assert [(m.source, m.target) for m in counted.transitions] == [
        (trace.sites[0], trace.sites[1]),
        (trace.sites[1], trace.sites[2]),
    ]
    for move in counted.transitions:
        expected = torch.zeros_like(move.counts)
        for source, target in zip(
            first[move.source].tolist(), first[move.target].tolist(), strict=True
        ):
            if source >= 0 and target >= 0:
                expected[source, target] += 1
        assert torch.equal(move.counts, expected)


def test_pairs_are_the_callers(traced: Callable[..., Trace]) -> None:
    """Transitions are counted between the sites that were asked for."""
    trace = traced([(5, 2), (6, 3), (4, 1)])
    first, _, last = trace.sites
    (move,) = usage(trace, [(first, last)]).transitions
    assert move.counts.shape == (5, 4)


def test_doubled_experts_count_once() -> None:
    """An expert in two slots of one token is one call, with the sum of both weights."""
    infos = make_infos((3, 2))
    decision = Decision(torch.tensor([[1, 1]]), torch.tensor([[0.25, 0.5]]), 3)
    one = torch.zeros(1, dtype=torch.int64)
    chunk = Chunk(Tokens(one, one, one, one == 0), {infos[0].site: decision})
    tally = usage(make_trace(infos, [chunk])).sites[0].total
    assert tally.calls.tolist() == [0, 1, 0]
    assert tally.weight.tolist() == [0, 0.75, 0]


def test_nobody_called() -> None:
    """A site where every weight is zero has dead experts, and nan where a mean has no tokens."""
    infos = make_infos((3, 2))
    chunk = random_chunk(infos, 20, logits=False)
    silent = {site: replace(one, weights=one.weights * 0) for site, one in chunk.decisions.items()}
    tally = usage(make_trace(infos, [replace(chunk, decisions=silent)])).sites[0].total
    assert tally.dead == (0, 1, 2)
    assert tally.frequency.tolist() == [0, 0, 0]
    assert math.isnan(tally.entropy)
    assert math.isnan(tally.balance)
    assert math.isnan(tally.router_entropy)


def test_site_that_did_not_run(traced: Callable[..., Trace]) -> None:
    """A site that ran in some passes only is counted over those."""
    trace = traced([(5, 2), (5, 2)], (30, 20))
    one, two = trace.chunks()
    late = trace.sites[1]
    first = replace(one, decisions={trace.sites[0]: one.decisions[trace.sites[0]]})
    counted = usage(make_trace(trace.meta.sites, [first, two]))
    assert counted[late].total.tokens == int(two.tokens.real.sum())
    assert counted.tokens == int(one.tokens.real.sum() + two.tokens.real.sum())


def test_labels_are_remembered(traced: Callable[..., Trace]) -> None:
    """A label given with the prompt holds for the tokens that are decoded after it."""
    trace = traced([(5, 2)], (30, 20))
    one, two = trace.chunks()
    counted = usage(make_trace(trace.meta.sites, [one, replace(two, labels={})]))
    assert_same(counted, usage(trace))
    assert sum(counted.label_tokens.values()) < counted.tokens  # sample 3 has none


def test_gradients_are_left_alone(traced: Callable[..., Trace]) -> None:
    """A trace whose weights are in the autograd graph counts as any other."""
    trace = traced([(5, 2)], (30,))
    (chunk,) = trace.chunks()
    live = {
        site: replace(one, weights=one.weights.clone().requires_grad_())
        for site, one in chunk.decisions.items()
    }
    assert_same(usage(trace), usage(make_trace(trace.meta.sites, [replace(chunk, decisions=live)])))


def test_pool(traced: Callable[..., Trace]) -> None:
    """Pooling sites with the same experts adds their tallies."""
    counted = usage(traced([(5, 2), (5, 2)]))
    pooled = pool(counted.sites)
    assert pooled.tokens == 2 * counted.tokens
    assert torch.equal(pooled.calls, counted.sites[0].total.calls + counted.sites[1].total.calls)


def test_empty_trace() -> None:
    """A trace without sites or without tokens is a TraceError that says which."""
    with pytest.raises(TraceError, match="no sites"):
        usage(make_trace((), []))
    with pytest.raises(TraceError, match="empty"):
        usage(make_trace(make_infos((4, 2)), []))
    with pytest.raises(TraceError, match="empty"):
        UsageCounter(make_infos((4, 2))).result()


def test_memory_is_flat() -> None:
    """What the counter holds does not grow with the number of tokens."""
    infos = make_infos((8, 2))
    counter = UsageCounter(infos)
    sizes = []
    for seed in range(3):
        counter.add(random_chunk(infos, 500, seed))
        tables = counter._sums[infos[0].site]
        held = [*tables._integers.values(), *tables._reals.values()]
        sizes.append(sum(table.numel() for table in held))
    assert len(set(sizes)) == 1


def test_import_is_light() -> None:
    """Importing the room imports no torch."""
    code = "import sys, expertmix.attribute; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
