from __future__ import annotations

import torch

from expertmix.routers.calibrated import Spread


def test_a_level_is_of_the_scores_that_an_adapter_got():
    """Minus infinity (no candidate, for Lag) is no score of zero: it counts for nothing."""
    none = float("-inf")
    spread = Spread(3)
    spread.add(torch.tensor([[1.0, none, none], [1.2, 3.0, none]]))
    spread.add(torch.tensor([[0.8, none, none], [1.0, 3.4, none]]))
    level = spread.level()
    assert spread.count == 4
    torch.testing.assert_close(level.mean, torch.tensor([1.0, 3.2, 0.0]))
    torch.testing.assert_close(level.deviation, torch.tensor([0.02**0.5, 0.2, 1.0]))
