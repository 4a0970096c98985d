"""Laws that hold for the spectral routers: against literal definitions, and under symmetries."""

from __future__ import annotations

import pytest
import torch
from experts.world import (
    arrow_score,
    deltas,
    energy_score,
    projection_score,
    random_adapter,
    top_weights,
    zero,
)
from hypothesis import given
from hypothesis import strategies as st

from expertmix.experts.lora import Adapter, Factors
from expertmix.routers.arrow import Arrow
from expertmix.routers.lag import Lag
from expertmix.routers.router import Router
from expertmix.routers.spectr import SpectR
from expertmix.routers.uniform import Uniform

from .world import MODULE, hidden_states, planted, seen_of

ROUTERS = [
    SpectR("projection", top_k=2),
    SpectR("energy", top_k=2, weights="softmax", temperature=3.0),
    SpectR("projection", normalize=("input", "rank"), top_k=3, weights="softmax"),
    SpectR("energy", normalize=("size",), top_k=1),
    Arrow(top_k=2, temperature=0.5),
    Lag(m=3, top_k=2),
]
IDS = ["projection", "energy", "normalized", "sized", "arrow", "lag"]


def shelf(ranks=(4, 2, 4, 8, 3)) -> list[Adapter]:
    return [random_adapter(f"a{i}", i, rank=rank) for i, rank in enumerate(ranks)]


def dense(router: Router, adapters, hidden, rows: int = 1) -> torch.Tensor:
    """(T, E) weights."""
    indices, weights = router.decide(seen_of(adapters, hidden, rows=rows))
    return torch.zeros(len(hidden), len(adapters), dtype=weights.dtype).scatter(1, indices, weights)


@pytest.mark.parametrize(
    ("router", "score"),
    [
        (SpectR("projection", top_k=2), projection_score),
        (SpectR("energy", top_k=3, weights="softmax", temperature=9.0), energy_score),
        (Arrow(top_k=2, temperature=0.5), arrow_score),
        (Arrow(top_k=None, weights="uniform"), arrow_score),
    ],
)
def test_weights_are_those_of_the_definition(router, score):
    """A full SVD of the update, a score per token and a sort give the same weights."""
    adapters, hidden = [*shelf(), zero(random_adapter("null", 9))], hidden_states()
    updates = deltas(adapters, MODULE)
    rule = router.rule
    expected = torch.stack(
        [
            top_weights(
                [score(x, update) for update in updates], rule.top_k or 99, rule.weights,
                rule.temperature,
            )
            for x in hidden
        ]
    )  # fmt: skip
    torch.testing.assert_close(dense(router, adapters, hidden), expected)


@pytest.mark.parametrize("router", ROUTERS, ids=IDS)
def test_permuting_adapters_permutes_weights(router):
    """The order of the shelf does not matter."""
    adapters, hidden = shelf(), hidden_states()
    order = [3, 0, 4, 1, 2]
    expected = dense(router, adapters, hidden)[:, order]
    found = dense(router, [adapters[expert] for expert in order], hidden)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("router", ROUTERS, ids=IDS)
def test_signs_of_a_and_b_do_not_matter(router):
    """(-A, -B) is the same adapter, and is weighted alike."""
    adapters, hidden = shelf(), hidden_states()
    flipped = [
        Adapter(a.name, {m: Factors(-f.down, -f.up, f.scale) for m, f in a.factors.items()})
        for a in adapters
    ]
    torch.testing.assert_close(dense(router, flipped, hidden), dense(router, adapters, hidden))


@pytest.mark.parametrize("router", ROUTERS, ids=IDS)
def test_an_untrained_adapter_is_never_chosen(router):
    """B = 0: no weight, however many others there are; one that is alone is taken by nobody."""
    hidden = hidden_states()
    adapters = [zero(random_adapter("null", 9)), *shelf()]
    found = dense(router, adapters, hidden)
    assert (found[:, 0] == 0).all()
    torch.testing.assert_close(found[:, 1:], dense(router, shelf(), hidden))


@pytest.mark.parametrize("top_k", [3, 100])
def test_more_than_there_are(top_k):
    """k above the number of adapters at a module takes those that do something, once each."""
    adapters = [random_adapter("a", 1), zero(random_adapter("b", 2)), random_adapter("c", 3)]
    indices, weights = SpectR(top_k=top_k).decide(seen_of(adapters, hidden_states()))
    assert indices.sort(1).values.unique(dim=0).tolist() == [[0, 2]]
    assert (weights == 0.5).all()


@pytest.mark.parametrize("score", ["projection", "energy"])
@pytest.mark.parametrize("rank", [1, 4])
def test_orthogonal_adapters_are_routed_without_error(score, rank):
    """A token from the subspace that one planted adapter reads goes to that adapter, always."""
    adapters = planted(6, rank)
    torch.manual_seed(1)
    for expert, adapter in enumerate(adapters):
        down = adapter.factors[MODULE].down
        hidden = torch.randn(20, rank, dtype=torch.float64) @ down
        indices, _ = SpectR(score, top_k=1).decide(seen_of(adapters, hidden))
        assert (indices == expert).all()


def test_the_largest_adapter_does_not_win_when_normalized():
    """Energy prefers an adapter a thousand times larger; by size and in projection it does not."""
    adapters = planted(4, 4, sizes=[1000.0, 1.0, 1.0, 1.0])
    torch.manual_seed(1)
    noise = hidden_states(40)
    own = torch.randn(40, 4, dtype=torch.float64) @ adapters[1].factors[MODULE].down
    seen = seen_of(adapters, own / own.norm(dim=1, keepdim=True) + 0.05 * noise)
    share = {
        name: float((router.decide(seen)[0] == 1).double().mean())
        for name, router in {
            "energy": SpectR("energy", top_k=1),
            "size": SpectR("energy", normalize=("size",), top_k=1),
            "projection": SpectR("projection", top_k=1),
        }.items()
    }
    assert share["energy"] < 0.1
    assert share["size"] > 0.9
    assert share["projection"] == 1.0


def test_projections_grow_with_rank_unless_normalized():
    """On random inputs a rank-16 adapter wins over a rank-2 one by rank alone."""
    adapters = [random_adapter("thin", 1, rank=2), random_adapter("wide", 2, rank=16)]
    seen = seen_of(adapters, hidden_states(400))
    plain, _ = SpectR(top_k=1).decide(seen)
    fair, _ = SpectR(normalize=("rank",), top_k=1).decide(seen)
    assert float(plain.double().mean()) > 0.95
    assert 0.3 < float(fair.double().mean()) < 0.7


@given(st.floats(1e-3, 1e3))
def test_dividing_by_the_input_makes_scores_free_of_its_length(factor):
    """Normalized by ‖x‖ a score is a cosine: at most one, whatever the length of x."""
    adapters, hidden = shelf(), hidden_states()
    router = SpectR(normalize=("input",))
    scores = router.scores(seen_of(adapters, hidden))
    torch.testing.assert_close(router.scores(seen_of(adapters, hidden * factor)), scores)
    assert (scores <= 1 + 1e-9).all()
    zeros = router.scores(seen_of(adapters, hidden * 0))
    assert (zeros == 0).all()


def test_lag_is_projection_among_arrows_candidates():
    """With one candidate LAG is Arrow's choice, with all of them projection's."""
    adapters, hidden = [*shelf(), zero(random_adapter("null", 9))], hidden_states(60)
    seen = seen_of(adapters, hidden)
    first = [Lag(m=1).decide(seen)[0], Arrow(top_k=1).decide(seen)[0]]
    assert torch.equal(*first)
    for m in (5, 6, 99):
        assert torch.equal(Lag(m=m).decide(seen)[0], SpectR(top_k=1).decide(seen)[0])
    assert not torch.equal(first[0], SpectR(top_k=1).decide(seen)[0])


def test_uniform_is_uniform():
    """Every adapter that does something gets the same weight."""
    adapters = [*shelf(), zero(random_adapter("null", 9))]
    found = dense(Uniform(), adapters, hidden_states())
    assert torch.allclose(found, torch.tensor([0.2] * 5 + [0.0]))


def test_scores_are_differentiable():
    """Gradients of softmax weights reach the hidden states, and are right."""
    adapters = shelf((3, 3, 2))

    def weights(hidden: torch.Tensor) -> torch.Tensor:
        return SpectR("energy", top_k=None, weights="softmax", temperature=20.0).decide(
            seen_of(adapters, hidden)
        )[1]

    hidden = hidden_states(3).requires_grad_()
    assert torch.autograd.gradcheck(weights, [hidden])


def test_scores_of_half_precision_are_float32():
    """Scores of a bfloat16 module are computed in float32."""
    seen = seen_of(shelf(), hidden_states(dtype=torch.bfloat16))
    for router in ROUTERS:
        assert router.scores(seen).dtype == torch.float32
