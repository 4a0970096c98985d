"""Losses that keep routers in order."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from expertmix.models.coe.losses import balance_loss, z_loss

LOGITS_TE = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))
MASK_BS = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])


def test_it_is_that_of_transformers() -> None:
    """The balance loss of one router is transformers', divided by K."""
    theirs = load_balancing_loss_func((LOGITS_TE,), 6, 2)
    assert_close(balance_loss([LOGITS_TE], 2), theirs / 2)


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_many_routers_weigh_as_one(scores: str) -> None:
    """C routers that are alike give the loss of one."""
    one = balance_loss([LOGITS_TE], 2, scores=scores)
    assert_close(balance_loss([LOGITS_TE] * 3, 2, scores=scores), one)


def test_padding_does_not_count() -> None:
    """What a masked token asks for changes no loss; leaving it out gives the same."""
    counted = MASK_BS.reshape(-1).bool()
    for found, wanted in (
        (balance_loss([LOGITS_TE], 2, MASK_BS), balance_loss([LOGITS_TE[counted]], 2)),
        (z_loss([LOGITS_TE], MASK_BS), z_loss([LOGITS_TE[counted]])),
    ):
        assert_close(found, wanted)


def test_z_loss() -> None:
    """It is the mean square of log Σ exp."""
    assert_close(z_loss([LOGITS_TE]), LOGITS_TE.exp().sum(-1).log().square().mean())
