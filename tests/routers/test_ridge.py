from __future__ import annotations

import pytest
import torch
from experts.world import random_adapter

from expertmix.errors import ConfigError
from expertmix.routers.ridge import LinearMap, Moments, Ridge

from .test_scores import dense
from .world import MODULE, D, hidden_states

ADAPTERS = [random_adapter("a", 1), random_adapter("b", 2)]


def clusters(seed: int) -> list[torch.Tensor]:
    """Two kinds of text, 30 and 90 tokens, a little apart."""
    return [
        hidden_states(tokens, seed + kind) + 1.5 * hidden_states(1, 99 + kind)
        for kind, tokens in ((0, 30), (1, 90))
    ]


def fitted(texts: list[torch.Tensor], penalty: float = 1e-2) -> LinearMap:
    moments = Moments(D, [len(text) for text in texts])
    for expert, hidden in enumerate(texts):
        for part in hidden.split(17):
            moments.add(part, expert)
    return moments.solve(penalty)


def test_it_solves_the_stated_problem():
    """The gradient of the weighted, penalized squares vanishes at the solution."""
    texts = clusters(1)
    found = fitted(texts, 0.1)
    weight = found.weight.double().requires_grad_()
    bias = found.bias.double().requires_grad_()
    ridge = 0.1 * sum((text**2).mean() for text in texts) / 2
    loss = ridge * weight.square().sum()
    for expert, text in enumerate(texts):
        wrong = text @ weight.T + bias - torch.eye(2, dtype=torch.float64)[expert]
        loss = loss + wrong.square().sum(1).mean() / 2
    loss.backward()
    for grad in (weight.grad, bias.grad):
        torch.testing.assert_close(grad, torch.zeros_like(grad), atol=1e-6, rtol=0)


def test_it_routes_new_tokens_to_their_kind():
    """From a few tokens per adapter, held-out tokens are routed nearly without error."""
    router = Ridge({MODULE: fitted(clusters(1))}, top_k=1)
    for expert, hidden in enumerate(clusters(50)):
        assert float(dense(router, ADAPTERS, hidden)[:, expert].mean()) > 0.95


def test_a_shelf_that_was_not_fitted_is_refused():
    """Another module or another number of adapters, an adapter without text, no penalty."""
    router = Ridge({MODULE: fitted(clusters(1))})
    router.check(("a", "b"), (MODULE,))
    with pytest.raises(ConfigError, match="not fitted for module 'other'"):
        router.check(("a", "b"), (MODULE, "other"))
    with pytest.raises(ConfigError, match=r"for 2 adapters.*has 3"):
        router.check(("a", "b", "c"), (MODULE,))
    with pytest.raises(ConfigError, match="no text was given for adapter 1"):
        Moments(D, [3, 0])
    with pytest.raises(ConfigError, match="penalty"):
        Moments(D, [3, 1]).solve(0.0)
