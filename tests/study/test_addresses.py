from __future__ import annotations

import pytest

from expertmix.core.removal import Ablate, Mask
from expertmix.core.site import Site, SiteInfo
from expertmix.errors import (
    ConfigError,
    InterventionError,
    UnknownExpertError,
    UnknownSiteError,
)
from expertmix.study.addresses import edits, parse

NAMES = ("base", "maths", "python")
SITES = tuple(SiteInfo(Site(f"model.layers.{n}.mlp"), 3, 2, NAMES) for n in range(3))
NUMBERED = tuple(SiteInfo(Site(f"model.layers.{n}.mlp"), 8, 2) for n in range(2))


@pytest.mark.parametrize(
    ("text", "pattern", "experts"),
    [
        ("*:2", "*", (2,)),
        ("*.layers.1.mlp:python", "*.layers.1.mlp", (2,)),
        ("model.layers.1.mlp#0:base,maths", "model.layers.1.mlp#0", (0, 1)),
        ("*: 1", "*", (1,)),
    ],
)
def test_an_address_names_sites_and_experts(text, pattern, experts):
    """By number or by name, one or several."""
    assert parse(text, SITES) == (pattern, experts)


def test_edits_come_in_order():
    """Ablations first, then masks."""
    found = edits(SITES, ablate=["*:python"], mask=["*.layers.0.mlp:0"])
    assert found == (Ablate("*", (2,)), Mask("*.layers.0.mlp", (0,)))


@pytest.mark.parametrize("text", ["*", "", ":3", "*:", "*: "])
def test_what_is_no_address_is_told(text):
    """The message shows the form."""
    with pytest.raises(ConfigError, match="is not SITE:EXPERT"):
        parse(text, SITES)


def test_an_unknown_site_lists_near_names():
    """A typo is found at once."""
    with pytest.raises(UnknownSiteError, match=r"Near names: .*model\.layers\.1\.mlp"):
        parse("model.layer.1.mlp:0", SITES)


@pytest.mark.parametrize(
    ("text", "sites", "says"),
    [
        ("*:pyton", SITES, "no expert named 'pyton'; it has base, maths, python.*'python'"),
        ("*:python", NUMBERED, "its experts have numbers, 0 to 7"),
        ("*:3", SITES, "has experts 0 to 2, not 3"),
        ("*:-1", SITES, "has experts 0 to 2, not -1"),
    ],
)
def test_an_unknown_expert_is_told_with_what_there_is(text, sites, says):
    """By name with the names, by number with the range."""
    with pytest.raises(UnknownExpertError, match=says):
        edits(sites, ablate=[text])


def test_a_name_must_mean_the_same_number_everywhere():
    """Otherwise one edit would hit different experts."""
    mixed = (SITES[0], SiteInfo(Site("model.layers.9.mlp"), 3, 2, ("maths", "base", "python")))
    with pytest.raises(UnknownExpertError, match="different numbers"):
        parse("*:maths", mixed)
    assert parse("*:python", mixed) == ("*", (2,))


def test_a_mask_must_leave_enough():
    """Checked before any run."""
    with pytest.raises(InterventionError, match="leaves 1"):
        edits(SITES, mask=["*:0,1"])
