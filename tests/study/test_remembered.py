from __future__ import annotations

import pytest
import torch

from expertmix.bindings.pathways import open_pathways
from expertmix.core.pathway import Question, TunableRouters
from expertmix.study.remembered import Remembered, remembering
from expertmix.testing import tiny_moe

ASKED = [Question((5, 7 + n, 9), ((30, 31), (32,))) for n in range(4)]
OTHER = Question((8, 8), ((30,), (31,)))


@pytest.fixture(scope="module")
def opened():
    with open_pathways(tiny_moe("olmoe"), layers="last 1") as pathways:
        yield pathways


class Counted(Remembered):
    """Counts the plain passes that are done; remembers nothing."""

    def __init__(self, pathways) -> None:
        super().__init__(pathways, ())
        self.passes: list[tuple[Question, ...]] = []

    def read(self, questions):
        self.passes.append(tuple(questions))
        return super().read(questions)


def test_a_batch_is_read_once(opened):
    """What comes back later is what came the first time, and it cost what it cost then."""
    counted = Counted(opened)
    memory = remembering(counted, ASKED)
    first = memory.read(ASKED[:2])
    spent = memory.seconds(ASKED[0])
    again = memory.read(ASKED[:2])
    assert len(counted.passes) == 1
    assert spent == memory.seconds(ASKED[0]) == memory.seconds(ASKED[1]) > 0
    for one, other in zip(first, again, strict=True):
        assert one is other


def test_another_company_is_another_reading(opened):
    """Part of a batch, or another order, is read anew: rounding may differ."""
    counted = Counted(opened)
    memory = remembering(counted, ASKED)
    for batch in (ASKED[:2], ASKED[:1], ASKED[1::-1], ASKED[:2]):
        memory.read(batch)
    assert counted.passes == [tuple(ASKED[:2]), tuple(ASKED[:1]), tuple(ASKED[1::-1])]


@pytest.mark.parametrize(("budget", "passes"), [(0, 4), (1 << 30, 2)])
def test_beyond_the_budget_it_is_read_again(opened, budget, passes):
    """The same readings, bit for bit."""
    counted = Counted(opened)
    memory = remembering(counted, ASKED, budget)
    for batch in (ASKED[:2], ASKED[2:], ASKED[:2], ASKED[2:]):
        found = memory.read(batch)
        for one, own in zip(found, opened.read(batch), strict=True):
            assert torch.equal(one.logprobs, own.logprobs)
            assert all(torch.equal(one.state[key], own.state[key]) for key in own.state)
    assert len(counted.passes) == passes


def test_what_is_not_asked_for_is_not_kept(opened):
    """Longer prompts and references, which come once, take no room."""
    counted = Counted(opened)
    memory = remembering(counted, ASKED)
    for _ in range(2):
        memory.read([OTHER])
        memory.read([ASKED[0], OTHER])
    assert len(counted.passes) == 4


def test_it_can_do_what_the_pathways_can(opened):
    """All that they say of themselves; only routers that can be trained can be."""
    memory = remembering(opened, ASKED)
    for name in ("sites", "decisions", "scored", "shift", "exact", "notice"):
        assert getattr(memory, name) == getattr(opened, name)
    assert memory.fingerprint() == opened.fingerprint()
    assert isinstance(memory, TunableRouters) == isinstance(opened, TunableRouters)
    assert not isinstance(remembering(Counted(opened), ASKED), TunableRouters)
    batch = memory.batch(ASKED[:2], [one.state for one in memory.read(ASKED[:2])])
    assert torch.equal(memory.score(batch, None), opened.score(batch, None))
    assert all(a is b for a, b in zip(memory.gates(), opened.gates(), strict=True))
    assert torch.equal(memory.routed(batch), opened.routed(batch))
