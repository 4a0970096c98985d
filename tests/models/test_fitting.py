from __future__ import annotations

from pathlib import Path

import pytest
import torch

from expertmix.errors import ConfigError
from expertmix.models.fitting import METHODS, fit_routers
from expertmix.models.library import Library
from expertmix.models.unmerged import routed

from .conftest import load, tiny_tokenizer

TEXTS = {"ada": ["ab" * 30, "ba" * 25], "bob": ["cd" * 30], "cyd": ["ef" * 20, "fe" * 10]}


@pytest.mark.parametrize("method", sorted(METHODS))
def test_texts_find_their_expert(base: Path, shelf: Path, method: str) -> None:
    """Routers fitted to texts send most tokens of such a text to its expert."""
    model, tokenizer, library = load(base), tiny_tokenizer(), Library.open(shelf)
    routers = fit_routers(model, tokenizer, library, TEXTS, method=method)
    assert routers[0].shape == (4, 32)
    hits = []

    def decide(layer: int, x_TH: torch.Tensor) -> torch.Tensor:
        logits = x_TH @ routers[layer].T
        hits.append((logits.argmax(-1) == 2).float().mean().item())
        return logits

    with torch.no_grad(), routed(model, library, decide):
        model(torch.tensor([tokenizer("cd" * 12)["input_ids"]]))
    assert min(hits) > 0.8


def test_fitting_leaves_the_model_as_it_was(base: Path, shelf: Path) -> None:
    """After fitting, also after an error in it, the model's own MLPs are back."""
    model, library = load(base), Library.open(shelf)
    before = [layer.mlp for layer in model.model.layers]

    def stop(stage: str, done: int, total: int) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fit_routers(model, tiny_tokenizer(), library, TEXTS, progress=stop)
    assert [layer.mlp for layer in model.model.layers] == before


def test_unknown_method_is_refused(base: Path, shelf: Path) -> None:
    """The error names the methods there are."""
    with pytest.raises(ConfigError, match="ridge"):
        fit_routers(load(base), tiny_tokenizer(), Library.open(shelf), TEXTS, method="magic")


@pytest.mark.parametrize("method", sorted(METHODS))
def test_text_of_one_token_is_too_little(base: Path, shelf: Path, method: str) -> None:
    """A router needs a token to be fitted to and one to be chosen by; the expert is named."""
    model, library = load(base), Library.open(shelf)
    with pytest.raises(ConfigError, match="'bob' has too little text"):
        fit_routers(model, tiny_tokenizer(), library, TEXTS | {"bob": ["c"]}, method=method)
    fit_routers(model, tiny_tokenizer(), library, TEXTS | {"bob": ["cd"]}, method=method)
