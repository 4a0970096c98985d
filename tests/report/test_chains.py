"""Laws of the section on chains, and of its warnings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from plotly.graph_objects import Figure

from expertmix.attribute.chain import chains
from expertmix.core.decision import Decision
from expertmix.core.estimate import Estimate
from expertmix.core.site import Site, SiteInfo
from expertmix.core.tokens import Tokens
from expertmix.core.trace import Chunk, Memory, Trace, TraceMeta
from expertmix.experts.chain_updates import LayerUpdates
from expertmix.report import Report
from expertmix.report.chain_table import chain_table, chain_tables
from expertmix.report.chain_trouble import interval, share, troubles
from expertmix.report.terminal import data_table

from . import world
from .test_report import BROWSER, browse, data_of, words_of

__all__ = ["browse"]

EXPERTS, TOKENS = 8, 60


def random(step: int, before: list[torch.Tensor]) -> torch.Tensor:
    return torch.rand(TOKENS, EXPERTS).topk(2).indices


def again(step: int, before: list[torch.Tensor]) -> torch.Tensor:
    return before[0] if before else random(step, before)


def swinging(step: int, before: list[torch.Tensor]) -> torch.Tensor:
    """Even experts, then the odd ones beside them."""
    base = torch.rand(TOKENS, EXPERTS // 2).topk(2).indices * 2 if not before else before[0]
    return base + step % 2


def hub(step: int, before: list[torch.Tensor]) -> torch.Tensor:
    return torch.tensor([[0, 1]]).expand(TOKENS, 2)


def make_trace(
    route: Callable[[int, list[torch.Tensor]], torch.Tensor],
    *,
    steps: int = 2,
    layers: int = 4,
    texts: int = 10,
) -> Trace:
    torch.manual_seed(0)
    infos = [
        SiteInfo(Site(f"model.layers.{layer}.mlp", step), EXPERTS, 2)
        for layer in range(layers)
        for step in range(steps)
    ]
    chunks = []
    for text in range(texts):
        decisions: dict[Site, Decision] = {}
        for layer in range(layers):
            chosen: list[torch.Tensor] = []
            for step in range(steps):
                chosen.append(route(step, chosen))
                site = Site(f"model.layers.{layer}.mlp", step)
                decisions[site] = Decision(chosen[-1], torch.full((TOKENS, 2), 0.5), EXPERTS)
        place = torch.arange(TOKENS)
        tokens = Tokens(torch.full((TOKENS,), text), place, place, torch.ones(TOKENS).bool())
        chunks.append(Chunk(tokens, decisions))
    return Trace(TraceMeta("f" * 64, "a chain", tuple(infos)), Memory(chunks))


def updates(layers: int = 4, size: float = 0.4, cosine: float = 0.1) -> tuple[LayerUpdates, ...]:
    def near(value: float) -> Estimate:
        return Estimate(value, value - 0.002, value + 0.002)

    return tuple(
        LayerUpdates(f"model.layers.{layer}.mlp", (near(0.5), near(size)), (near(cosine),))
        for layer in range(layers)
    )


def kinds(trace: Trace, *measured: LayerUpdates) -> set[str]:
    return {one.kind for one in troubles(chains(trace), measured)}


def test_nothing_is_wrong_with_chance() -> None:
    """Routing at random, and updates of a fair size, raise no warning."""
    assert kinds(make_trace(random, steps=3), *updates()) == set()


@pytest.mark.parametrize(
    ("route", "steps", "kind"),
    [(again, 2, {"again"}), (swinging, 3, {"swing"}), (hub, 2, {"hub", "dead", "again"})],
)
def test_planted_troubles(route: Any, steps: int, kind: set[str]) -> None:
    """What was planted is found, and nothing else."""
    assert kinds(make_trace(route, steps=steps)) == kind


def test_few_texts_carry_no_warning() -> None:
    """Without an interval nothing is said of routes; experts that nobody calls are counted."""
    assert kinds(make_trace(hub, texts=3)) == {"dead"}


def test_troubles_of_updates() -> None:
    """An update of nothing, and one that takes back the one before, are told with numbers."""
    trace = make_trace(random)
    assert kinds(trace, *updates(size=0.003)) == {"still"}
    (first, *_) = troubles(chains(trace), updates(cosine=-0.9))
    assert first.kind == "opposed"
    assert "\u22120.90 (\u22120.90 to \u22120.90)" in first.finding
    assert "smaller scale" in first.advice


def test_an_interval_stays_within_a_share() -> None:
    """No share is below none or above all."""
    assert interval(Estimate(0.99, 0.97, 1.02)) == "99\u202f% (97\u202f% to 100\u202f%)"
    assert share(0.03125) == "3.1\u202f%"
    assert share(0.0999) == "10\u202f%"
    assert interval(Estimate(0.5)) == "50\u202f%"


def test_the_table() -> None:
    """A row per layer and pair of iterations, with both chances."""
    table = chain_table(chains(make_trace(again, steps=3)))
    assert len(table.rows) == 8
    assert table.rows[0][:2] == ("0", "#0 to #1")
    assert table.rows[0][3] == "25\u202f%"
    assert "100\u202f%" in table.headline
    assert data_table(table).row_count == 8
    assert chain_tables(None) == ()


@pytest.fixture(scope="module")
def page() -> str:
    return Report.of(make_trace(swinging, steps=3), updates=updates()).html()


def test_only_with_chains(page: str) -> None:
    """The section is on the page of a chain, and on no other."""
    assert 'id="chains"' in page
    assert 'id="chains"' not in Report.of(world.named_trace(2)).html()


def test_figures_are_plotly(page: str) -> None:
    """plotly accepts every chart: one of sizes, and three for each layer."""
    plots = {key: plot for key, plot in data_of(page)["plots"].items() if key.startswith("chain")}
    assert len(plots) == 1 + 3 * 4
    for plot in plots.values():
        Figure({"data": plot["data"], "layout": plot["layout"]})


def test_the_map_is_the_transitions(page: str) -> None:
    """Rows of the heat map sum to one, and show what was planted: 0 after 1, 1 after 0."""
    plot = data_of(page)["plots"]["chain-map-0"]
    assert len(plot["choices"]) == 2
    for row in plot["data"][0]["z"][::2]:
        assert sum(row) == pytest.approx(1, abs=0.01)
    assert plot["data"][0]["z"][0][1] == 0.5
    assert plot["data"][0]["z"][1] == [None] * EXPERTS


def test_the_words(page: str) -> None:
    """Warnings stand on top, with advice once; iterations are named as their sites are."""
    text = words_of(page)
    assert "What to look at:" in text
    assert text.count("Routes swing") == 4
    assert text.count("go back and forth") == 1
    assert "There is something to look at in layers 0, 1, 2 and 3." in text


def test_a_file_alone_has_no_sizes() -> None:
    """A page made of a trace alone says that sizes were not measured."""
    assert "Sizes were not measured" in words_of(Report.of(make_trace(random)).html())


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_browser(page: str, browse: Callable[[str], tuple[str, str]]) -> None:
    """In a browser the charts of the layer that shows are drawn, and the console is empty."""
    document, console = browse(page)
    assert console == ""
    plots = data_of(page)["plots"]
    assert document.count('class="plot js-plotly-plot"') == len(plots) - 3 * 3
