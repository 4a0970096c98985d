from __future__ import annotations

import pytest
import torch

from expertmix.errors import CheckpointError
from expertmix.experts.lora import Adapter, Factors
from expertmix.experts.spectra import decompose_adapter


def test_values_that_are_not_finite_are_refused():
    """NaN or infinity in a factor is refused, naming adapter and module."""
    for bad in (float("nan"), float("inf")):
        down, up = torch.ones(2, 3), torch.ones(4, 2)
        up[1, 1] = bad
        with pytest.raises(CheckpointError, match=r"'ada'.*'mlp.up_proj'.*NaN or infinite"):
            Adapter("ada", {"mlp.up_proj": Factors(down, up, 1.0)})


def test_factors_must_fit_each_other():
    """Factors of two ranks, or of another dimension, are refused."""
    for down, up in ((torch.ones(2, 3), torch.ones(4, 3)), (torch.ones(2, 3, 1), torch.ones(4, 2))):
        with pytest.raises(CheckpointError, match="do not fit"):
            Adapter("ada", {"up": Factors(down, up, 1.0)})


def test_float8_is_read_and_integers_are_refused():
    """Any floating type is decomposed; quantized factors are refused by name."""
    down, up = torch.ones(2, 3), torch.ones(4, 2)
    small = Adapter("ada", {"up": Factors(down.to(torch.float8_e4m3fn), up, 1.0)})
    assert decompose_adapter(small).modules["up"].rank == 1
    with pytest.raises(CheckpointError, match=r"'ada', module 'up'.*int8"):
        Adapter("ada", {"up": Factors(down.to(torch.int8), up, 1.0)})


def test_an_adapter_without_modules_is_refused():
    """An adapter that adapts nothing is an error."""
    with pytest.raises(CheckpointError, match="no module"):
        Adapter("ada", {})


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 1e300])
def test_a_scale_that_is_not_finite_is_refused(scale):
    """It would spread to every token."""
    with pytest.raises(CheckpointError, match=r"'ada'.*'up'.*scale"):
        Adapter("ada", {"up": Factors(torch.ones(2, 3), torch.ones(4, 2), scale)})
