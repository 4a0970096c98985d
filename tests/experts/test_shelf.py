from __future__ import annotations

from pathlib import Path

import pytest
import torch

from expertmix.errors import CheckpointError
from expertmix.experts.shelf import Shelf

from .world import peft_model, random_adapter


def test_open_and_from_peft_agree(library: Path):
    """A folder and a live model of its adapters give the same shelf."""
    stored = Shelf.open(library)
    live = Shelf.from_peft(peft_model(*[library / name for name in stored.names]))
    assert live.names == stored.names
    assert [one.digest for one in live] == [one.digest for one in stored]


def test_spectra_follow_the_hash():
    """Only what changed is decomposed again: the rest are the very same spectra."""
    old = Shelf.of([random_adapter("a", 1), random_adapter("b", 2)])
    new = Shelf.of([random_adapter("a", 1), random_adapter("b", 3)], known=old)
    assert new.adapters[0] is old.adapters[0]
    assert new.adapters[1].digest == random_adapter("b", 3).digest


def test_adding_replacing_and_removing():
    """Each gives a new shelf and leaves the old one as it was."""
    shelf = Shelf.of([random_adapter("a", 1), random_adapter("b", 2)])
    more = shelf.plus(random_adapter("c", 3))
    other = more.plus(random_adapter("a", 4))
    assert more.names == other.names == ("a", "b", "c")
    assert other.adapters[0].digest == random_adapter("a", 4).digest
    assert other.adapters[1] is shelf.adapters[1]
    assert more.minus("a").names == ("b", "c")
    assert shelf.names == ("a", "b")
    with pytest.raises(CheckpointError, match=r"no adapter 'x'.*a, b"):
        shelf.minus("x")


def test_names_are_unique_and_there_is_one():
    """No adapter, or two of one name, is an error."""
    with pytest.raises(CheckpointError, match="at least one"):
        Shelf.of([])
    with pytest.raises(CheckpointError, match="two adapters are named 'a'"):
        Shelf.of([random_adapter("a", 1), random_adapter("a", 2)])


def test_a_live_model_may_be_trained_on(library: Path):
    """What happens to a PeftModel's weights after they were taken changes nothing on the shelf."""
    model = peft_model(library / "ada")
    shelf = Shelf.from_peft(model)
    digest = Shelf.open(library / "ada").adapters[0].digest
    before = {module: one.right.clone() for module, one in shelf.adapters[0].modules.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    for module, spectrum in shelf.adapters[0].modules.items():
        assert torch.equal(spectrum.right, before[module])
    assert shelf.adapters[0].digest == digest
