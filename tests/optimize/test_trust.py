from __future__ import annotations

import pytest
import torch

from expertmix.optimize.trust import divergence, project


def pathways():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(4, 2, 3, 6, generator=generator)
    values = start + 3 * torch.randn(4, 2, 3, 6, generator=generator)
    values[0] = start[0]
    values[..., 5] = float("-inf")
    return values, start


def test_the_divergence_is_the_mean_kl_over_the_core():
    """KL(new ‖ base) of torch, the base's mass outside the core left out; 0 where none moved."""
    values, start = pathways()
    new, base = values[..., :5].log_softmax(-1), start[..., :5].log_softmax(-1)
    want = torch.nn.functional.kl_div(base, new, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(divergence(values, start), want.mean((1, 2)), atol=1e-6, rtol=1e-5)
    assert float(divergence(values, start)[0]) == 0


@pytest.mark.parametrize("limit", [0.0, 0.01, 0.3])
@pytest.mark.parametrize("mode", ["set", "add"])
def test_a_projected_pathway_is_within_the_limit_and_reaches_it(limit, mode):
    """KL ≤ limit holds exactly; who was beyond it ends at it, who was within is untouched."""
    values, start = pathways()
    if mode == "add":
        values = (values - start).nan_to_num(neginf=float("-inf"))[:, :1]
    found = project(values, start, limit, mode)
    before, after = divergence(values, start, mode), divergence(found, start, mode)
    assert (after <= limit).all()
    beyond = before > limit
    assert beyond.sum() >= 3
    torch.testing.assert_close(
        after[beyond], torch.full_like(after[beyond], limit), atol=1e-4, rtol=0
    )
    assert torch.equal(found[~beyond], values[~beyond])
    assert torch.equal(found.isinf(), values.isinf())


def test_the_projection_lies_on_the_line_to_the_start():
    """ω' − s is a positive multiple, at most 1, of ω − s."""
    values, start = pathways()
    found = project(values, start, 0.1)
    part = ((found - start) / (values - start))[1:, ..., :5].flatten(1)
    assert ((part > 0) & (part < 1)).all()
    torch.testing.assert_close(part, part[:, :1].expand_as(part), atol=1e-4, rtol=1e-3)
