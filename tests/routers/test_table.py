from __future__ import annotations

import pytest

from expertmix.errors import ConfigError
from expertmix.routers.arrow import Arrow
from expertmix.routers.fixed import Fixed
from expertmix.routers.pooled import Pooled
from expertmix.routers.spectr import SpectR
from expertmix.routers.table import ROUTERS, make_router, router_of
from expertmix.routers.uniform import Uniform


def test_a_router_by_name():
    """Names and fields give the router; without settings its defaults."""
    assert make_router("spectr", {"score": "energy", "top_k": 1}) == SpectR("energy", top_k=1)
    assert make_router("spectr", {"normalize": ["rank"]}) == SpectR(normalize=("rank",))
    assert make_router("uniform") == Uniform()
    assert make_router("fixed", {"weights": {"a": 0.5}}) == Fixed({"a": 0.5})
    assert set(ROUTERS) == {"pooled", "spectr", "arrow", "lag", "uniform", "fixed", "oracle"}


def test_unknown_names_are_errors_that_name_the_near_one():
    """A typo in a router, or in a setting of it, is told with what it should have been."""
    with pytest.raises(ConfigError, match=r"no router 'specter'.*did you mean 'spectr'"):
        make_router("specter")
    with pytest.raises(ConfigError, match=r"no setting 'topk'.*did you mean 'top_k'"):
        make_router("spectr", {"topk": 3})
    with pytest.raises(ConfigError, match="no setting 'top_k'; it has none"):
        make_router("uniform", {"top_k": 3})
    with pytest.raises(ConfigError, match="no setting 3"):
        make_router("spectr", {3: 4})
    with pytest.raises(ConfigError, match="'fixed' needs weights"):
        make_router("fixed")


def test_settings_of_another_type_are_told():
    """Words where numbers belong are refused as impossible values."""
    for settings in ({"temperature": "hot"}, {"half_life": "long"}, {"prior": True}):
        with pytest.raises(ConfigError, match=next(iter(settings))):
            make_router("pooled", settings)


def test_a_router_inside_of_a_router():
    """By name, or as a mapping with its settings; anything else says what it must be."""
    inner = {"kind": "spectr", "score": "energy"}
    assert make_router("pooled", {"inner": inner}) == Pooled(SpectR("energy"))
    assert router_of({"kind": "pooled", "inner": "arrow"}) == Pooled(Arrow())
    assert router_of(SpectR()) == SpectR()
    with pytest.raises(ConfigError, match="'kind'"):
        router_of({"score": "energy"})
    with pytest.raises(ConfigError, match="no router 'spektr'"):
        make_router("pooled", {"inner": "spektr"})
