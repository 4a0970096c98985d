from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from expertmix.optimize.descent import NGD
from expertmix.optimize.global_delta import GlobalDelta
from expertmix.optimize.memo import Memo
from expertmix.optimize.reference import ReferenceSet
from expertmix.optimize.remix import remix

from .world import FakePathways, topical


def test_a_thing_is_learned_once_from_the_same_source():
    """Equal sources are the same; another one is learned anew, and the last is kept."""
    memo, learned = Memo(), []

    def learn():
        learned.append(1)
        return torch.tensor(float(len(learned)))

    assert [float(memo.get(source, learn)) for source in ((1,), (1,), (2,), (1,))] == [1, 1, 2, 3]


@pytest.mark.parametrize(("states", "changed"), [(True, False), (False, False), (True, True)])
def test_what_is_opened_again_teaches_nothing_new(states, changed):
    """A second run learns nothing, with states or without; other labels are learned anew."""
    method, learned = GlobalDelta(NGD(steps=1)), []
    reference = ReferenceSet.build(FakePathways(pull=0.6), topical(9), states=states)
    told = replace(reference, samples=[replace(one, gold=1) for one in reference.samples])
    for known in (reference, told if changed else reference):
        remix(FakePathways(pull=0.6), topical(2, seed=1), known, method)
        learned.append(method.memo.kept)
    assert (learned[0] is learned[1]) is not changed
