from __future__ import annotations

import pytest
import torch

from expertmix.optimize.schedule import Mover, cosine


def test_the_cosine_is_the_one_of_torch():
    """λₜ for t = 0 … T − 1 equals CosineAnnealingLR, from the paper's 1e-2 to 1e-5."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10, eta_min=1e-5)
    for step in range(10):
        assert cosine(step, 10, 1e-2, 1e-5) == pytest.approx(schedule.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize(("name", "theirs"), [("gd", torch.optim.SGD), ("adam", torch.optim.Adam)])
def test_moves_are_those_of_torch(name, theirs):
    """Ten steps of random gradients, to 1e-6."""
    generator = torch.Generator().manual_seed(0)
    weight, mine = torch.nn.Parameter(torch.zeros(5)), torch.zeros(5)
    optimizer, mover = theirs([weight], lr=0.1), Mover(name)
    for _ in range(10):
        weight.grad = torch.randn(5, generator=generator)
        optimizer.step()
        mine = mine + mover.move(weight.grad, 0.1)
    torch.testing.assert_close(mine, weight.detach(), atol=1e-6, rtol=1e-5)
