"""Where the states of references come from."""

from __future__ import annotations

import torch

from expertmix.optimize.states import Held, RereadStates

from .world import FakePathways, topical


def state(size: int = 25):
    """Of 100 bytes, unless told."""
    return {"hidden": torch.zeros(size)}


def test_states_that_were_used_last_are_held():
    """Within a limit of bytes, whatever their number; at least so many in any case."""
    held = Held(350)
    for number in range(3):
        held.keep(number, state())
    assert held.find(0) is not None
    held.keep(3, state())
    assert [held.find(number) is not None for number in range(4)] == [True, False, True, True]
    held.keep(4, state(1000))
    assert [held.find(number) is not None for number in range(5)] == [False] * 4 + [True]
    held.least = 3
    for number in range(5, 8):
        held.keep(number, state(1000))
    assert [held.find(number) is not None for number in range(4, 8)] == [False, True, True, True]


def test_references_are_read_again_once():
    """Prefetched together in batches; what is here is not read again; one by one as well."""
    fake = FakePathways()
    states = RereadStates(fake, topical(20), batch_size=4)
    states.prefetch([3, 3, 1, 7, 9, 2])
    assert fake.passes == 2
    for number in (1, 2, 3, 7, 9):
        assert states.get(number)["hidden"].shape == (5, 8)
    states.prefetch([1, 2])
    assert fake.passes == 2
    states.get(11)
    states.get(11)
    assert fake.passes == 3
