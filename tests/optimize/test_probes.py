from __future__ import annotations

import torch

from expertmix.core.pathway import Question
from expertmix.optimize.probes import Probe, chunks, neighbor_probes
from expertmix.optimize.samples import Sample

from .problems import problem_of
from .world import FakePathways, samples


def probe(length: int) -> Probe:
    return Probe(0, 0, 1.0, Sample(Question((1, 2), ((3,) * length, (4,))), 0), {})


def test_chunks_hold_every_probe_once_and_no_more_than_the_limit():
    """Whatever the lengths."""
    lengths = torch.randint(1, 40, (50,), generator=torch.Generator().manual_seed(0)).tolist()
    probes = [probe(length) for length in lengths]
    found = list(chunks(probes, 1, 7, gold_only=True))
    assert sorted(row for rows in found for row in rows) == list(range(50))
    assert max(map(len, found)) <= 7


def test_probes_of_one_length_are_asked_together_and_a_long_one_apart():
    """Padding many short rows to a long one would cost more than another pass."""
    probes = [probe(2)] * 10 + [probe(60)] + [probe(3)]
    assert list(chunks(probes, 1, 64, gold_only=True)) == [[*range(10), 11], [10]]


def test_nobody_is_no_probe():
    """-1 is left out; the others keep their place and their weight."""
    problem = problem_of(FakePathways(), samples(2), samples(3, seed=1))
    found = neighbor_probes(
        problem.reference, torch.tensor([[2, -1], [-1, 0]]), torch.tensor([[0.5, 0], [0, 0.25]])
    )
    assert [(one.owner, one.slot, one.weight) for one in found] == [(0, 0, 0.5), (1, 1, 0.25)]
    assert [one.sample.name for one in found] == ["s1-2", "s1-0"]
