from __future__ import annotations

import torch

from expertmix.optimize.memo import Memo


def test_a_thing_is_learned_once_from_the_same_objects():
    """Equal objects are not the same ones: what another model taught is never given out."""
    memo, first, second = Memo(), [1], [1]
    learned = []

    def learn():
        learned.append(1)
        return torch.tensor(float(len(learned)))

    assert [float(memo.get((one,), learn)) for one in (first, first, second, first)] == [1, 1, 2, 3]
