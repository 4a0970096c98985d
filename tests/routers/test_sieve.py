"""A sieve changes what a decision costs, not the decision."""

from __future__ import annotations

import pytest
import torch
from experts.world import random_adapter, zero

from expertmix.experts.lora import Adapter, Factors
from expertmix.routers import router as router_file
from expertmix.routers.calibrated import Calibrated, Spread
from expertmix.routers.pooled import Pooled
from expertmix.routers.seen import Seen
from expertmix.routers.spectr import SpectR

from .world import MODULE, directions_of, hidden_states, seen_of, sieved_of

ROUTERS = [
    SpectR(top_k=2),
    SpectR("energy", top_k=2, weights="softmax", temperature=3.0),
    SpectR(normalize=("input", "rank"), top_k=1, weights="softmax"),
    SpectR("energy", normalize=("size",), top_k=3),
]
IDS = ["projection", "energy", "normalized", "sized"]


COUNT = 90


def shelf(count: int = COUNT) -> list[Adapter]:
    adapters = [random_adapter(f"a{i}", i, rank=2 + i % 3) for i in range(count)]
    return [*adapters, zero(random_adapter("null", 999))]


def calibrated(router: SpectR) -> Calibrated:
    spread = Spread(COUNT + 1)
    spread.add(router.scores(seen_of(shelf(), hidden_states(50, 8))))
    return Calibrated(router, {MODULE: spread.level()})


@pytest.mark.parametrize("router", [*ROUTERS, *map(calibrated, ROUTERS[:3])])
@pytest.mark.parametrize("tokens", [1, 200])
def test_a_sieved_decision_is_the_exact_one(router, tokens):
    """Adapters and weights are those of exact scores of all, though all were seen roughly."""
    hidden = hidden_states(tokens)
    exact = router.decide(seen_of(shelf(), hidden))
    seen = sieved_of(shelf(), hidden)
    found = router.decide(seen)
    assert seen._projected is None
    assert seen.rough._projected is not None
    assert torch.equal(found[0], exact[0])
    torch.testing.assert_close(found[1], exact[1])


@pytest.mark.parametrize("router", ROUTERS, ids=IDS)
def test_scores_that_are_shown_decide_alike(router):
    """The highest of the scores that a recording shows are the selected, and exact."""
    hidden = hidden_states(200)
    ranked = router.ranked(sieved_of(shelf(), hidden))
    indices, _ = router.decide(sieved_of(shelf(), hidden))
    assert torch.equal(ranked.topk(router.rule.top_k).indices, indices)
    exact = router.scores(seen_of(shelf(), hidden))
    torch.testing.assert_close(ranked.gather(1, indices), exact.gather(1, indices))
    error = (ranked - exact)[:, :COUNT].norm() / exact[:, :COUNT].norm()
    assert float(error) < 0.01
    assert torch.isneginf(ranked[:, COUNT]).all()


def test_ties_in_bfloat16_are_told_apart():
    """Two adapters that are one in bfloat16 are ranked by what float64 says."""
    one = random_adapter("one", 1, rank=1)
    down = one.factors[MODULE].down
    generator = torch.Generator().manual_seed(3)
    other = down + 1e-4 * torch.randn(down.shape, generator=generator, dtype=torch.float64)
    near = Adapter("near", {MODULE: Factors(other, one.factors[MODULE].up, 1.0)})
    adapters = [one, near, *shelf(80)]
    hidden = down * 3 + 1e-2 * hidden_states(200)
    exact, _ = SpectR(top_k=1).decide(seen_of(adapters, hidden))
    found, _ = SpectR(top_k=1).decide(sieved_of(adapters, hidden))
    assert len(exact.unique()) == 2
    assert torch.equal(found, exact)


def test_gradients_come_from_exact_scores():
    """Softmax weights have the gradient that they have without a sieve."""
    router = SpectR(top_k=3, weights="softmax")
    grads = []
    for see in (seen_of, sieved_of):
        hidden = hidden_states(4).requires_grad_()
        _, weights = router.decide(see(shelf(), hidden))
        weights[:, 0].sum().backward()
        grads.append(hidden.grad)
    torch.testing.assert_close(*grads)


def test_a_sieve_that_would_keep_most_is_not_used(monkeypatch: pytest.MonkeyPatch):
    """With few adapters, or many selected, scores are exact at once: no rough product."""
    monkeypatch.setattr(router_file, "MARGIN", 30)
    seen = sieved_of(shelf(), hidden_states(200))
    SpectR(top_k=2).decide(seen)
    assert seen._projected is not None
    assert seen.rough._projected is None


def test_a_rough_pass_is_rough():
    """What is seen roughly is within bfloat16's precision, and costs that type."""
    hidden = hidden_states(200)
    rough = sieved_of(shelf(), hidden).rough
    assert isinstance(rough, Seen)
    assert rough.projected.dtype == torch.bfloat16
    expected = directions_of(shelf()).project(hidden)
    error = (rough.projected.double() - expected).norm() / expected.norm()
    assert 1e-4 < float(error) < 1e-2


@pytest.mark.parametrize("inner", [SpectR(), SpectR(score="energy"), calibrated(SpectR())])
def test_rough_evidence_of_many_modules_adds_up(inner):
    """Evidence is pooled in float32: bfloat16 cannot even count beyond 256 modules."""
    router, hidden = Pooled(inner, prior=0.0), hidden_states(1)
    memory = router.memory(torch.ones(1, 1, dtype=torch.bool), None)
    for _ in range(400):
        seen = sieved_of(shelf(), hidden)
        seen.memory = memory
        found = router.scores(seen)
    scores = inner.scores(seen_of(shelf(), hidden))[:, :COUNT]
    expected = (scores - scores.mean(1, keepdim=True)).to(found)
    assert found.dtype.itemsize >= torch.float32.itemsize
    error = (found[:, :COUNT] - expected).norm() / expected.norm()
    assert float(error) < 0.05
