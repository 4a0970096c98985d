from __future__ import annotations

import pytest
import torch

from expertmix.errors import ConfigError, UnsupportedRuntimeError
from expertmix.routers.calibrated import Calibrated, Level
from expertmix.routers.fixed import Fixed
from expertmix.routers.lag import Lag
from expertmix.routers.oracle import Oracle
from expertmix.routers.pooled import Pooled, calibrated, is_calibrated, measured
from expertmix.routers.spectr import SpectR

from .world import MODULE, D, hidden_states, planted, seen_of

ADAPTERS = planted(4, 3)
LEVELS = {MODULE: Level(torch.zeros(4), torch.ones(4))}


def reads(adapter: int, tokens: int, noise: float, seed: int = 0) -> torch.Tensor:
    """Hidden states that one adapter reads, and much that none in particular does."""
    generator = torch.Generator().manual_seed(seed)
    down = ADAPTERS[adapter].factors[MODULE].down
    signal = torch.randn(tokens, len(down), generator=generator, dtype=torch.float64) @ down
    noisy = torch.randn(tokens, D, generator=generator, dtype=torch.float64)
    return signal / signal.norm(dim=1, keepdim=True) + noise * noisy / D**0.5


def chosen(router: Pooled, hidden: torch.Tensor) -> torch.Tensor:
    seen = seen_of(ADAPTERS, hidden)
    seen.memory = router.memory(torch.ones(1, len(hidden), dtype=torch.bool), None)
    return router.decide(seen)[0][:, 0]


def test_pooling_finds_what_single_tokens_miss():
    """With planted adapters under much noise, pooled decisions are right where single ones fail."""
    hidden = reads(2, 200, noise=3.0)
    alone = SpectR(top_k=1).decide(seen_of(ADAPTERS, hidden))[0][:, 0]
    pooled = chosen(Pooled(top_k=1), hidden)
    assert (alone == 2).float().mean() < 0.7
    assert (pooled[32:] == 2).all()


def test_a_text_may_change_its_subject():
    """Within a few half-lives the router follows; one that never forgets does not."""
    hidden = torch.cat([reads(0, 150, 1.0), reads(3, 60, 1.0, seed=1)])
    assert (chosen(Pooled(half_life=8, top_k=1), hidden)[-20:] == 3).all()
    assert (chosen(Pooled(half_life=None, top_k=1), hidden)[-20:] == 0).all()


def test_the_prior_makes_first_tokens_careful():
    """With a prior, the first token's weights are nearer to equal ones."""
    hidden = reads(1, 30, noise=1.0)

    def first(prior: float) -> float:
        router = Pooled(prior=prior, top_k=None, temperature=0.3)
        seen = seen_of(ADAPTERS, hidden)
        seen.memory = router.memory(torch.ones(1, 30, dtype=torch.bool), None)
        return float(router.decide(seen)[1][0].max())

    assert 0.25 < first(20.0) < first(0.0)


def test_without_a_pass_there_is_no_memory():
    """A module that runs on its own is told to run within the model."""
    with pytest.raises(UnsupportedRuntimeError, match="whole pass"):
        Pooled().decide(seen_of(ADAPTERS, hidden_states()))


def test_calibration_goes_to_the_evidence():
    """Calibrating a pooled router wraps what is inside; again replaces it; others are wrapped."""
    inner = SpectR()
    router = calibrated(Pooled(inner), LEVELS)
    assert isinstance(router, Pooled)
    assert isinstance(router.inner, Calibrated)
    assert measured(router) is inner
    assert is_calibrated(router)
    assert not is_calibrated(Pooled())
    again = calibrated(router, LEVELS)
    assert isinstance(again, Pooled)
    assert measured(again) is inner
    assert measured(calibrated(inner, LEVELS)) is inner


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"half_life": 0}, "half_life"),
        ({"half_life": float("inf")}, "half_life"),
        ({"prior": -1}, "prior"),
        ({"temperature": 0}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"weights": "given"}, "weights"),
        ({"inner": "spectr"}, "inner"),
        ({"inner": Pooled()}, "inner"),
        ({"evidence": None}, "evidence"),
    ],
)
def test_impossible_settings_are_refused(settings, word):
    """Each with its name."""
    with pytest.raises(ConfigError, match=word):
        Pooled(**settings)


def test_evidence_must_name_a_module():
    """A pattern that matches nothing is told before anything runs."""
    with pytest.raises(ConfigError, match="gate_proj"):
        Pooled(evidence="*.gate_proj").check(("a", "b"), (MODULE,))
    Pooled(evidence="*.up_proj").check(("a", "b"), (MODULE,))


def test_a_module_that_reads_other_tokens_is_told():
    """Evidence is of the tokens of the pass; who reads some of them, or more, cannot take part."""
    seen = seen_of(ADAPTERS, hidden_states(11))
    seen.memory = Pooled().memory(torch.ones(2, 11, dtype=torch.bool), None)
    with pytest.raises(UnsupportedRuntimeError, match=rf"'{MODULE}' reads 11 tokens.* over 22"):
        Pooled().decide(seen)


@pytest.mark.parametrize(
    "inner", [Lag(), Fixed("a"), Oracle(("a",)), Calibrated(Lag(), LEVELS)], ids=str
)
def test_evidence_must_be_of_every_adapter(inner):
    """Who scores some adapters only (minus infinity for all others) cannot be pooled: told so."""
    with pytest.raises(ConfigError, match="every adapter"):
        Pooled(inner)
