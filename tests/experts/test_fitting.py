from __future__ import annotations

from pathlib import Path

import pytest
import torch

from expertmix.core.record import record
from expertmix.core.removal import Ablate
from expertmix.errors import ConfigError
from expertmix.experts.composed import Composed
from expertmix.experts.fitting import calibrate, fit_ridge
from expertmix.experts.lora import Adapter, Factors
from expertmix.experts.peft_folder import read_adapter
from expertmix.experts.shelf import Shelf
from expertmix.routers.spectr import SpectR

from .world import (
    VOCAB,
    peft_adapter,
    peft_model,
    random_adapter,
    state,
    tiny_llama,
    zero,
)

SITE = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    """Weak adapters, as after some training: what modules read stays near the base's."""
    root = tmp_path_factory.mktemp("ridge")
    adapters = [read_adapter(peft_adapter(root / name, seed)) for seed, name in enumerate("abc")]
    return Shelf.of(
        Adapter(
            one.name,
            {m: Factors(f.down, f.up, 0.01 * f.scale) for m, f in one.factors.items()},
        )
        for one in adapters
    )


def domains(seed: int, length: int = 40) -> dict[str, list[torch.Tensor]]:
    """Three kinds of text: each draws its tokens from a third of the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    third = (VOCAB - 2) // 3
    return {
        name: [
            torch.randint(2 + number * third, 2 + (number + 1) * third, (1, length),
                          generator=generator) for _ in range(3)
        ]
        for number, name in enumerate("abc")
    }  # fmt: skip


def test_it_routes_unseen_text_of_each_kind(shelf: Shelf):
    """Fitted on 120 tokens per adapter, new text goes to its own adapter nearly everywhere."""
    model = tiny_llama()
    was = state(model)
    router = fit_ridge(model, shelf, domains(1), top_k=1)
    assert state(model) == was
    with Composed(model, shelf, router) as composed:
        for expert, texts in enumerate(domains(2).values()):
            with torch.no_grad(), record(composed) as trace:
                composed.model(texts[0])
            found = torch.stack([trace[site].indices[:, 0] == expert for site in trace.sites])
            assert float(found.double().mean()) > 0.9


def test_a_live_peft_model_is_read_as_its_base(tmp_path: Path):
    """On a PeftModel the base's hidden states count, not those of its active adapter."""
    folders = [peft_adapter(tmp_path / name, seed) for seed, name in enumerate("abc")]
    shelf = Shelf.open(folders)
    plain = fit_ridge(tiny_llama(), shelf, domains(1))
    wrapped = fit_ridge(peft_model(*folders), shelf, domains(1))
    for module, found in plain.maps.items():
        torch.testing.assert_close(wrapped.maps[module].weight, found.weight)


def test_every_adapter_needs_text(shelf: Shelf):
    """A missing adapter, and a text of none, are told."""
    some = domains(1)
    del some["b"]
    with pytest.raises(ConfigError, match="no text was given for adapter 1"):
        fit_ridge(tiny_llama(), shelf, some)
    with pytest.raises(ConfigError, match="'zoe'"):
        fit_ridge(tiny_llama(), shelf, {**domains(1), "zoe": []})


def test_calibrated_scores_have_one_level(shelf: Shelf):
    """On the text of the calibration every adapter's score has mean 0 and deviation 1."""
    model, texts = tiny_llama(), [text for one in domains(1).values() for text in one]
    was = state(model)
    router = calibrate(model, shelf, SpectR("energy", top_k=1), texts)
    assert state(model) == was
    with torch.no_grad(), Composed(model, shelf, router) as composed:
        idle = Ablate("*", experts=range(3))
        with record(composed, idle, logits=True) as trace:
            for text in texts:
                model(text)
    for site in trace.sites:
        logits = trace[site].logits
        torch.testing.assert_close(logits.mean(0), torch.zeros(3), atol=1e-3, rtol=0)
        torch.testing.assert_close(logits.std(0), torch.ones(3), atol=1e-2, rtol=0)


def test_the_largest_adapter_does_not_win_when_calibrated(shelf: Shelf):
    """By energy an adapter of hundredfold scale takes every token; calibrated it does not."""
    large = [
        Adapter(f"{seed}", random_adapter("", seed, [SITE], scale=scale).factors)
        for seed, scale in ((1, 1e-3), (2, 1e-1), (3, 1e-3))
    ]
    crowd, texts = Shelf.of(large), [text for one in domains(1).values() for text in one]
    energy = SpectR("energy", top_k=1)
    for router, least, most in (
        (energy, 1.0, 1.0),
        (calibrate(tiny_llama(), crowd, energy, texts), 0.1, 0.6),
    ):
        composed = Composed(tiny_llama(), crowd, router)
        with torch.no_grad(), record(composed) as trace:
            composed.model(domains(2)["a"][0])
            composed.model(domains(2)["c"][0])
        share = float((trace[SITE].indices == 1).double().mean())
        assert least <= share <= most


def test_idle_adapters_and_other_shelves(shelf: Shelf):
    """An adapter with B = 0 stays unchosen; another shelf, or no text, is refused."""
    crowd = shelf.plus(zero(random_adapter("idle", 1, [SITE])))
    router = calibrate(tiny_llama(), crowd, SpectR(top_k=4), domains(1)["a"])
    with torch.no_grad(), Composed(tiny_llama(), crowd, router) as composed:
        with record(composed) as trace:
            composed.model(domains(2)["b"][0])
        assert (trace[SITE].indices != 3).all()
    with pytest.raises(ConfigError, match="not for this shelf"):
        Composed(tiny_llama(), shelf, router)
    with pytest.raises(ConfigError, match="at least two tokens"):
        calibrate(tiny_llama(), shelf, SpectR(), [])
