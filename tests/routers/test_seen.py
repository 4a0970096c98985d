"""What is asked of a pass is the same however it is computed, and nothing more is computed."""

from __future__ import annotations

import pytest
import torch
from experts.world import random_adapter, zero
from torch import Tensor

from expertmix.routers import directions as directions_file
from expertmix.routers.arrow import Arrow
from expertmix.routers.fixed import Fixed
from expertmix.routers.lag import Lag
from expertmix.routers.oracle import Oracle
from expertmix.routers.ridge import LinearMap, Ridge
from expertmix.routers.router import Router
from expertmix.routers.seen import Seen
from expertmix.routers.spectr import SpectR
from expertmix.routers.uniform import Uniform

from .world import MODULE, D, directions_of, hidden_states, sieved_of

EQUAL, MIXED = (3,) * 40, (4, 2, 4, 8, 3) * 8
RANKS = pytest.mark.parametrize("ranks", [EQUAL, MIXED], ids=["equal", "mixed"])


@pytest.fixture(params=["dots", "copied", "sorted"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All ways of projecting on a few adapters, each for any number of tokens."""
    monkeypatch.setattr(directions_file, "SORTED", 0 if request.param == "sorted" else 10**9)
    monkeypatch.setattr(directions_file, "FEW", 0 if request.param == "sorted" else 10**9)
    if request.param == "copied":
        copied = directions_file.Directions._copied
        monkeypatch.setattr(directions_file.Directions, "_dots", copied)
    monkeypatch.setattr(directions_file.Directions, "apart", lambda *_: True)
    monkeypatch.setattr(directions_file, "GATHERED", 3 * D)


def shelf(ranks) -> list:
    return [
        *(random_adapter(f"a{i}", i, rank=rank) for i, rank in enumerate(ranks)),
        zero(random_adapter("null", 99)),
    ]


def chosen(tokens: int, experts: int, width: int) -> Tensor:
    shares = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(4))
    return shares.topk(width).indices


def broken() -> Tensor:
    raise AssertionError("all directions were multiplied")


@RANKS
@pytest.mark.usefixtures("way")
def test_some_are_those_of_all(ranks):
    """Projections on a few adapters per token are those among all, and 0 beyond a rank."""
    directions, hidden = directions_of(shelf(ranks)), hidden_states(17)
    indices = chosen(17, 41, 5)
    indices[0, 0] = 40
    found = Seen(hidden, directions, product=broken).some(indices)
    whole = Seen(hidden, directions)
    assert whole.projected.shape[1] == sum(ranks)
    torch.testing.assert_close(found, whole.some(indices))
    for token in (0, 7):
        for place, expert in enumerate(indices[token].tolist()):
            rank = ranks[expert] if expert < 40 else 0
            own = directions.right[:, directions.places[expert]].T @ hidden[token]
            torch.testing.assert_close(found[token, place, :rank], own)
            assert not found[token, place, rank:].any()


@RANKS
@pytest.mark.usefixtures("way")
def test_norms_of_some_are_those_of_all(ranks):
    """‖V_iᵀx‖ and ‖S_iV_iᵀx‖ of a few adapters are their scores among all."""
    directions, hidden = directions_of(shelf(ranks)), hidden_states(17)
    indices = chosen(17, 40, 5)
    for score in ("projection", "energy"):
        expected = SpectR(score).scores(Seen(hidden, directions)).gather(1, indices)
        seen = Seen(hidden, directions, product=broken)
        torch.testing.assert_close(seen.norms(indices, energy=score == "energy"), expected)


@pytest.mark.usefixtures("way")
def test_gradients_of_some():
    """They are those of finite differences, in both ways."""
    directions = directions_of(shelf((3, 2, 4)))
    indices = chosen(3, 3, 2)
    hidden = hidden_states(3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: directions.some(x, indices), [hidden])


@pytest.mark.parametrize("router", [SpectR(top_k=2), Arrow(), Lag(m=2, top_k=2)])
def test_a_pass_over_no_token(router):
    """Nothing is decided for nobody, and nothing breaks."""
    hidden = hidden_states(0)
    for seen in (Seen(hidden, directions_of(shelf(EQUAL))), sieved_of(shelf(EQUAL), hidden)):
        indices, weights = router.decide(seen)
        assert indices.shape == weights.shape == (0, router.rule.top_k)
        assert seen.some(indices).shape == (0, router.rule.top_k, 3)


@RANKS
def test_first_directions_alone(ranks):
    """|v_i1·x| needs the first directions alone, and nothing for an adapter with B = 0."""
    directions, hidden = directions_of(shelf(ranks)), hidden_states()
    first = Seen(hidden, directions, product=broken).first
    for expert in range(40):
        start = directions.places[expert].start
        expected = (hidden @ directions.right[:, start]).abs()
        torch.testing.assert_close(first[:, expert], expected)
    assert torch.isneginf(first[:, 40]).all()


@pytest.mark.parametrize(
    "router",
    [
        Arrow(), Lag(m=2, top_k=2), Fixed("a3"), Oracle(("a1",)), Uniform(),
        Ridge({MODULE: LinearMap(torch.randn(41, D), torch.randn(41))}),
    ],
    ids=lambda router: type(router).__name__,
)  # fmt: skip
@pytest.mark.parametrize("tokens", [1, 200])
def test_who_needs_no_whole_product_makes_none(router: Router, tokens: int):
    """Only routers that score by all directions multiply all; others decide without."""
    assert not router.whole
    hidden = hidden_states(tokens)
    indices, _ = router.decide(Seen(hidden, directions_of(shelf(EQUAL)), product=broken,
                                    module=MODULE))  # fmt: skip
    assert len(indices) == tokens
    assert SpectR().whole


def test_what_is_known_is_not_asked_again():
    """The product is made once; narrowing candidates keeps what is known of them."""
    directions, hidden = directions_of(shelf(EQUAL)), hidden_states(200)
    made = []
    seen = Seen(hidden, directions, product=lambda: made.append(1) or directions.project(hidden))
    assert seen.projected is seen.projected
    assert len(made) == 1
    candidates = chosen(200, 40, 4)
    seen = Seen(hidden, directions, product=broken)
    values = seen.some(candidates)
    narrow = seen.narrowed(candidates, torch.tensor([[2, 0]]).expand(200, 2))
    assert torch.equal(narrow, candidates[:, [2, 0]])
    assert torch.equal(seen.some(narrow), values[:, [2, 0]])


def test_few_adapters_are_projected_with_all():
    """Where the asked-for adapters are most of the shelf, one product with all is faster."""
    directions = directions_of(shelf(EQUAL))
    assert directions.apart(4, 2)
    assert not directions.apart(4, 3)
    assert directions.apart(512, 5)
    assert not directions.apart(512, 6)
