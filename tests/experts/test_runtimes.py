"""Types, threads, gradients: a shelf works in all the ways in which a model can run."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from expertmix.errors import ConfigError
from expertmix.experts.composed import Composed
from expertmix.experts.peft_folder import read_library
from expertmix.experts.shelf import Shelf
from expertmix.routers.fixed import Fixed
from expertmix.routers.pooled import Pooled
from expertmix.routers.spectr import SpectR
from expertmix.routers.uniform import Uniform

from .world import (
    ALL,
    IDS,
    close,
    logits_of,
    more,
    tiny_llama,
)

NAMES = ("ada", "bob", "cyd", "dee")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(library: Path, dtype):
    """In half precision the logits are near those of float32 with the same rounded base."""
    exact = tiny_llama(dtype=dtype).float()
    with Composed(tiny_llama(dtype=dtype), Shelf.open(library), Uniform()) as composed:
        found = logits_of(composed.model)
    with Composed(exact, Shelf.open(library), Uniform()) as composed:
        fine = logits_of(composed.model)
    assert found.dtype == dtype
    assert float((found.float() - fine).norm() / fine.norm()) < 50 * torch.finfo(dtype).eps


def test_coarse_projections_are_near_exact_ones(library: Path):
    """bfloat16 projections on a float32 model: float32 out, near the exact; gradients flow."""
    with Composed(tiny_llama(), Shelf.open(library), Uniform()) as composed:
        exact = logits_of(composed.model)
    with Composed(
        tiny_llama(), Shelf.open(library), Uniform(), projections=torch.bfloat16
    ) as composed:
        found = logits_of(composed.model)
        embeds = composed.model.get_input_embeddings()(IDS).detach().requires_grad_()
        composed.model(inputs_embeds=embeds).logits.sum().backward()
    assert found.dtype == torch.float32
    assert 0 < float((found - exact).norm() / exact.norm()) < 0.05
    assert torch.isfinite(embeds.grad).all()
    with pytest.raises(ConfigError, match="floating"):
        Composed(tiny_llama(), Shelf.open(library), Uniform(), projections=torch.int8)


def test_autocast(library: Path):
    """Under bfloat16 autocast a float32 model runs, near its own logits; few adapters and many."""
    crowd = Shelf.of([*read_library(library), *more(30)])
    for shelf, router in ((Shelf.open(library), Uniform()), (crowd, Fixed({"ada": 1, "more3": 1}))):
        with Composed(tiny_llama(), shelf, router) as composed:
            exact = logits_of(composed.model)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                found = logits_of(composed.model)
        assert float((found.float() - exact).norm() / exact.norm()) < 0.1


class Int8Linear(nn.Module):
    """A quantized linear module, as other packages have them: no nn.Linear, no float weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax() / 127
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.weight.to(x.dtype) * self.scale).T


def quantized(model: nn.Module) -> nn.Module:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if name in ALL:
                setattr(module, name, Int8Linear(child))
    return model


def test_quantized_bases(library: Path):
    """On a base of integer weights the adapters act in the type of the activations."""
    dequantized = tiny_llama()
    with torch.no_grad():
        for name, module in quantized(tiny_llama()).named_modules():
            if isinstance(module, Int8Linear):
                dequantized.get_submodule(name).weight.copy_(module.weight * module.scale)
    with Composed(dequantized, Shelf.open(library), SpectR(top_k=2)) as composed:
        expected = logits_of(composed.model)
    with Composed(quantized(tiny_llama()), Shelf.open(library), SpectR(top_k=2)) as composed:
        close(logits_of(composed.model), expected)


def test_a_model_that_is_cast_or_copied_goes_on(library: Path):
    """Casting after installing works; a deep copy of the model is routed like the model."""
    composed = Composed(tiny_llama(), Shelf.open(library), SpectR())
    close(logits_of(copy.deepcopy(composed.model)), logits_of(composed.model))
    composed.model.double()
    assert logits_of(composed.model).dtype == torch.float64


def test_threads_share_a_model(library: Path):
    """Two threads that run one composed model at once get what each gets alone."""
    batches = [IDS, IDS.flip(1)]
    with Composed(tiny_llama(), Shelf.open(library), SpectR(top_k=2)) as composed:
        alone = [logits_of(composed.model, ids) for ids in batches]
        with ThreadPoolExecutor(2) as pool:
            runs = [pool.submit(logits_of, composed.model, batches[i % 2]) for i in range(40)]
        for number, run in enumerate(runs):
            assert torch.equal(run.result(), alone[number % 2])


DIRECTION = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def finite_difference(model, embeds, step=1e-3):
    losses = [
        model(inputs_embeds=embeds + sign * step * DIRECTION).logits.square().mean()
        for sign in (1, -1)
    ]
    return float(losses[0] - losses[1]) / (2 * step)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_the_input(library: Path, checkpointing):
    """A loss has the same gradient for the embeddings with and without gradient checkpointing."""
    model = tiny_llama()
    with Composed(model, Shelf.open(library), SpectR("energy", weights="softmax")):
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        embeds = model.get_input_embeddings()(IDS).detach().requires_grad_()
        model(inputs_embeds=embeds, use_cache=False).logits.square().mean().backward()
        if not checkpointing:
            numeric = finite_difference(model, embeds.detach())
            assert float((embeds.grad * DIRECTION).sum()) == pytest.approx(numeric, rel=2e-2)
        assert embeds.grad.abs().sum() > 0


@pytest.mark.parametrize("router", [SpectR(top_k=2), Pooled(top_k=2)])
def test_a_compiled_model(library: Path, router):
    """torch.compile leaves the hooks out of its graphs: the same logits, also in decoding."""
    with Composed(tiny_llama(), Shelf.open(library), router) as composed:
        expected = logits_of(composed.model)
        torch.compiler.reset()
        compiled = torch.compile(composed.model, backend="eager")
        close(logits_of(compiled), expected)
        cache = DynamicCache(config=composed.model.config)
        with torch.no_grad():
            parts = [compiled(part, cache=cache, use_cache=True).logits for part in IDS.split(1, 1)]
        close(torch.cat(parts, 1), expected)
    torch.compiler.reset()
