"""How a trace is read: by site."""

from __future__ import annotations

import pytest
import torch

import expertmix as em
from expertmix.core.decision import Decision
from expertmix.core.tokens import Tokens
from expertmix.core.trace import Chunk, Memory, Trace, TraceMeta
from expertmix.errors import TraceError, UnknownSiteError

SITES = tuple(em.SiteInfo(em.Site(f"model.layers.{i}.mlp"), 6, 2) for i in range(3))


def a_trace(*counts: int) -> Trace:
    chunks = []
    for count in counts:
        zeros = torch.zeros(count, dtype=torch.int64)
        made = Decision(torch.zeros(count, 2, dtype=torch.int64), torch.ones(count, 2), 6)
        tokens = Tokens(zeros, torch.arange(count), zeros, zeros == 0)
        chunks.append(Chunk(tokens, {info.site: made for info in SITES}))
    return Trace(TraceMeta("f", "m", SITES), Memory(chunks))


def test_a_site_is_named_by_any_pattern_for_it_alone():
    """The whole name, its end, a glob or a Site; a pattern for several says how to choose."""
    trace = a_trace(3, 2)
    for name in ("model.layers.1.mlp", "layers.1.mlp", "*.1.*", "*.1.mlp#0", SITES[1].site):
        assert len(trace[name]) == 5
        assert trace.info(name) == SITES[1]
    with pytest.raises(UnknownSiteError, match=r"matches 3 sites.*model\.layers\.0\.mlp#0"):
        trace["*"]
    with pytest.raises(UnknownSiteError, match=r"model\.layers\.1\.mlp"):
        trace["model.layer.1.mlp"]


def test_a_trace_is_a_map_of_sites_with_the_length_of_its_tokens():
    """Iterating gives sites, `in` asks for one, and the length counts tokens."""
    trace = a_trace(3, 2)
    assert list(trace) == [info.site for info in SITES]
    assert "model.layers.1.mlp" in trace
    assert em.Site("elsewhere") not in trace
    assert len(trace) == 5


def test_an_empty_trace_says_so():
    """Reading what was never recorded says what to do."""
    with pytest.raises(TraceError, match="run the model inside"):
        a_trace()["*.1.mlp"]
