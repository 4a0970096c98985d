from __future__ import annotations

import pytest
import torch

from expertmix.routers.pairs import Pairs


@pytest.mark.parametrize("most", [1, 4, 1000])
def test_parts_are_each_adapters_own(most):
    """Every pair comes once, with its adapter, whatever is gathered at once; order comes back."""
    indices = torch.randint(0, 7, (13, 3), generator=torch.Generator().manual_seed(1))
    values = torch.randn(13, 5, generator=torch.Generator().manual_seed(2))
    pairs = Pairs.of(indices)
    parts = list(pairs.parts(values, most))
    assert [expert for expert, _ in parts] == sorted(set(indices.flatten().tolist()))
    marked = torch.cat([part + 10 * expert for expert, part in parts])
    expected = values[:, None] + 10 * indices[..., None]
    assert torch.equal(pairs.unsorted(marked).view(13, 3, 5), expected)


def test_no_pair_at_all():
    """A pass over no token has no part."""
    assert not list(Pairs.of(torch.zeros(0, 3, dtype=torch.int64)).parts(torch.zeros(0, 5), 4))
