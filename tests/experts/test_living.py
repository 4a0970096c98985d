"""A shelf on a living model: adapters come, go and change; PEFT's Arrow fails most of these."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from expertmix.core.record import record
from expertmix.errors import CheckpointError, ConfigError, UnsupportedRuntimeError
from expertmix.experts.composed import Composed
from expertmix.experts.peft_folder import read_adapter
from expertmix.experts.shelf import Shelf
from expertmix.routers.arrow import Arrow
from expertmix.routers.fixed import Fixed
from expertmix.routers.router import Router
from expertmix.routers.spectr import SpectR

from .world import (
    IDS,
    close,
    logits_of,
    peft_adapter,
    peft_model,
    random_adapter,
    state,
    tiny_llama,
)

ROUTER = SpectR(top_k=2)


@pytest.fixture
def composed(library: Path) -> Iterator[Composed]:
    with Composed(tiny_llama(), Shelf.open(library), ROUTER) as made:
        yield made


def fresh(shelf: Shelf, router: Router = ROUTER) -> torch.Tensor:
    with Composed(tiny_llama(), shelf, router) as made:
        return logits_of(made.model)


def test_prototypes_follow_an_adapter_that_was_trained_again(composed, tmp_path: Path):
    """Under the same name with other weights: routed as if it had always been there."""
    again = read_adapter(peft_adapter(tmp_path / "bob", 77, target_modules=["q_proj", "v_proj"]))
    shelf = composed.plan.shelf.plus(again)
    before = logits_of(composed.model)
    composed.change(shelf=shelf)
    assert not torch.equal(logits_of(composed.model), before)
    close(logits_of(composed.model), fresh(shelf))


def test_an_adapter_is_removed(composed):
    """The others go on; only the removed one is gone."""
    composed.change(shelf=composed.plan.shelf.minus("ada"))
    assert composed.sites[0].experts == ("bob", "cyd", "dee", "eve")
    close(logits_of(composed.model), fresh(composed.plan.shelf))


def test_an_adapter_with_new_modules_is_added(library: Path):
    """Modules that were not adapted before become sites; afterwards nothing is left of them."""
    model = tiny_llama()
    was, plain = state(model), logits_of(model)
    with Composed(model, Shelf.open(library / "dee"), ROUTER) as composed:
        assert len(composed.sites) == 1
        composed.change(shelf=Shelf.open(library))
        assert len(composed.sites) == 14
        close(logits_of(model), fresh(Shelf.open(library)))
        composed.change(shelf=Shelf.open(library / "dee"))
        assert len(composed.sites) == 1
        close(logits_of(model), fresh(Shelf.open(library / "dee")))
    assert state(model) == was
    assert torch.equal(logits_of(model), plain)


def test_a_shelf_that_does_not_fit_changes_nothing(composed):
    """After an error the model is usable as before, with the shelf it had."""
    before, was = logits_of(composed.model), state(composed.model)
    odd = random_adapter("odd", 1, ["model.layers.0.mlp.down_proj"])
    with pytest.raises(CheckpointError, match="'odd'"):
        composed.change(shelf=composed.plan.shelf.plus(odd))
    with pytest.raises(ConfigError, match="'zoe'"):
        composed.change(router=Fixed("zoe"))
    assert state(composed.model) == was
    assert torch.equal(logits_of(composed.model), before)


def test_a_request_keeps_what_it_started_with(composed):
    """Inside of `pinned` a run goes on with its shelf while another thread changes it."""
    before = logits_of(composed.model)
    with composed.pinned():
        other = threading.Thread(target=lambda: composed.change(router=Fixed("ada")))
        other.start()
        other.join()
        assert torch.equal(logits_of(composed.model), before)
        assert composed.plan.router == ROUTER
    assert composed.plan.router == Fixed("ada")
    close(logits_of(composed.model), fresh(composed.plan.shelf, Fixed("ada")))


def test_nothing_changes_under_a_recording(composed):
    """Changing the shelf inside of a record block is refused."""
    with record(composed), pytest.raises(UnsupportedRuntimeError, match="recording is open"):
        composed.change(router=Fixed("ada"))


def test_it_is_the_same_again_from_its_files(library: Path):
    """Loaded twice, the same bits: no random start, nothing that a reload loses."""
    for router in (ROUTER, Arrow()):
        assert torch.equal(fresh(Shelf.open(library), router), fresh(Shelf.open(library), router))


def test_a_new_adapter_on_a_live_peft_model(library: Path):
    """An adapter that PEFT loads later is taken up by reading the live model again."""
    model = peft_model(library / "ada")
    shelf = Shelf.from_peft(model)
    with Composed(model, shelf, ROUTER) as composed:
        model.load_adapter(str(library / "cyd"), adapter_name="cyd")
        composed.change(shelf=Shelf.from_peft(model, known=shelf))
        assert composed.plan.shelf.adapters[0] is shelf.adapters[0]
        expected = fresh(Shelf.open([library / "ada", library / "cyd"]))
        close(logits_of(model), expected)


def test_inputs_that_are_not_contiguous(composed):
    """Transposed embeddings are routed like their copies."""
    embeds = composed.model.get_input_embeddings()(IDS).detach()
    crooked = embeds.transpose(0, 1).contiguous().transpose(0, 1)
    assert not crooked.is_contiguous()
    with torch.no_grad():
        found = composed.model(inputs_embeds=crooked).logits
    close(found, logits_of(composed.model))
    module = composed.model.model.layers[0].mlp.up_proj
    wide = torch.randn(2, 5, 64)[..., ::2]
    with torch.no_grad():
        close(module(wide), module(wide.contiguous()))


def test_inference_mode_and_training_take_turns(composed):
    """A first run in inference mode spoils no later backward."""
    with torch.inference_mode():
        composed.model(IDS)
    embeds = composed.model.get_input_embeddings()(IDS).detach().requires_grad_()
    composed.model(inputs_embeds=embeds).logits.sum().backward()
    assert embeds.grad.abs().sum() > 0


def test_after_an_interrupt_the_plan_is_the_latest(composed):
    """Ctrl-C in a pass, then two changes: the second builds on the first."""

    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    handle = composed.model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        composed.model(IDS)
    handle.remove()
    composed.change(shelf=composed.plan.shelf.minus("ada"))
    composed.change(shelf=composed.plan.shelf.minus("bob"))
    assert composed.plan.shelf.names == ("cyd", "dee", "eve")
    close(logits_of(composed.model), fresh(composed.plan.shelf))
