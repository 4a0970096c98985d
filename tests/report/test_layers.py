"""Pages about adapters: layers instead of modules, and the word adapter."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch

from expertmix.attribute import usage
from expertmix.core.decision import Decision
from expertmix.core.site import Site, SiteInfo
from expertmix.core.trace import Memory, Trace
from expertmix.report import Report
from expertmix.report.layers import EVERYWHERE, Layers
from expertmix.report.routing_check import RoutingCheck
from expertmix.report.sections import evenness, load, own, serves

from .adapters import KINDS, NAMES, adapter_infos, adapter_trace
from .world import named_trace


def data(page: str):
    """What the page's script is given."""
    found = re.search(r'id="report-data" type="application/json">(.*?)</script>', page, re.S)
    assert found is not None
    return json.loads(found[1])


def visible(page: str) -> str:
    """Text between tags, without script and style."""
    bare = re.sub(r"<(script|style)[^>]*>.*?</\1>", "", page, flags=re.S)
    return re.sub(r"<[^>]+>", " ", bare)


def test_a_page_about_adapters_never_says_expert():
    """Whatever it shows; the name of the program aside."""
    check = RoutingCheck(NAMES, {name: [0.5, 0.3, 0.2] for name in NAMES}, 0.4, 0.5)
    page = Report.of(adapter_trace(), routing=check).html()
    words = visible(page).replace("expertmix", "")
    assert "adapter" in words
    assert not re.search("expert", words, re.I)


def test_a_page_about_experts_says_expert():
    """As before."""
    words = visible(Report.of(named_trace(4)).html())
    assert "adapter" not in words
    assert "Which expert serves which text?" in words


def test_modules_are_shown_by_layer_and_by_kind():
    """A map of layers, and one of kinds; the weight that the maps show adds up to one."""
    trace = adapter_trace()
    report = Report.of(trace)
    assert [report.names[site.site] for site in report.ran] == ["0", "1", "2", "3"]
    section = load.section(report)
    assert section is not None
    layers, kinds = section.plots
    assert layers.data[0]["x"] == ["0", "1", "2", "3"]
    assert kinds.data[0]["x"] == ["q_proj", "up_proj", "down_proj"]
    for plot in section.plots:
        columns = zip(*plot.data[0]["z"], strict=True)
        assert all(sum(column) == pytest.approx(1, abs=1e-3) for column in columns)
    site = usage(trace)["model.layers.0.mlp.up_proj"]
    assert report.usage.sites[0].total.tokens == 3 * site.total.tokens


def test_the_serving_table_starts_with_weight():
    """Of many modules one or other calls everybody; the strongest pairing is told in words."""
    section = serves.section(Report.of(adapter_trace()))
    shown = re.findall(r"<option[^>]*>(\w+)", section.body)
    assert shown == ["weight", "called", "first"]
    assert re.search(r"gets \d+\u202f% of the weight on `maths` text", section.headline)
    assert "33.3\u202f%" in section.headline


def test_strips_show_all_layers_together_first():
    """Then each: a token's weights are means over the modules of the layer."""
    trace = adapter_trace()
    found = data(Report.of(trace).html())["tokens"]
    assert [site["name"] for site in found["sites"]] == ["all", "0", "1", "2", "3"]
    assert (found["noun"], found["start"]) == ("layer", 0)
    (chunk, *_) = trace.chunks()
    layers = Layers.of(trace.meta)
    assert layers is not None
    pooled = layers.pooled(chunk)
    assert set(pooled.decisions) == {EVERYWHERE, *(Site(f"model.layers.{n}") for n in range(4))}
    modules = [chunk.decisions[Site(f"model.layers.2.{kind}")].dense() for kind in KINDS]
    torch.testing.assert_close(
        pooled.decisions[Site("model.layers.2")].dense(), torch.stack(modules).mean(0)
    )


def test_strips_can_be_answers():
    """Then the page says who made a token, not who read it."""
    report = Report.of(adapter_trace(), strips=Report.of(adapter_trace()).strips)
    assert "Which adapter made which token?" in visible(report.html())
    assert "Which adapter made which token?" not in visible(Report.of(adapter_trace()).html())
    none = Report.of(adapter_trace(), strips=())
    assert "which token?" not in visible(none.html())


def test_modules_that_do_not_share_their_experts_stay_as_they_are():
    """A MoE with adapters on it has sites of both kinds: nothing is pooled."""
    mixed = (*adapter_infos(2), SiteInfo(Site("model.layers.0.mlp"), 3, 2))
    report = Report.of(adapter_trace(mixed))
    assert report.layers is None
    assert len(report.ran) == len(mixed)
    assert report.expert == "expert"
    assert report.html()


@pytest.mark.parametrize("labels", [NAMES, (None, None), ("poetry", "prose")])
@pytest.mark.parametrize(
    "infos",
    [
        adapter_infos(1),
        adapter_infos(1, kinds=KINDS[:1]),
        adapter_infos(3, kinds=KINDS[:1]),
        adapter_infos(2, names=tuple(f"adapter {n}" for n in range(30))),
        adapter_infos(2, names=("only",))[:1],
        (SiteInfo(Site("lm_head"), 3, 3, NAMES), *adapter_infos(2)),
    ],
    ids=["one layer", "one module", "one kind", "thirty", "one adapter", "a head"],
)
def test_a_page_can_be_made_of_any_library(infos, labels):
    """One layer, one module, one adapter, many adapters, modules outside of layers."""
    infos = tuple(
        SiteInfo(i.site, i.num_experts, min(i.top_k, i.num_experts), i.experts) for i in infos
    )
    page = Report.of(adapter_trace(infos, labels=labels)).html()
    assert "adapter" in visible(page)
    data(page)


def test_names_cannot_break_the_page():
    """Markup in an adapter's name is text."""
    check = RoutingCheck(NAMES, {NAMES[2]: [0.5, 0.3, 0.2]}, 0.4, 0.5)
    assert "<b>poetry</b>" not in Report.of(adapter_trace(), routing=check).html()


def test_a_check_is_a_table_with_its_own_cells_marked():
    """Layers are a line beside chance, numbers stand below."""
    check = RoutingCheck(
        NAMES, {name: [0.5, 0.3, 0.2] for name in NAMES}, 0.42, 0.625,
        {f"model.layers.{n}": n / 8 for n in range(4)}, {"q_proj": 0.25, "up_proj": 0.5},
    )  # fmt: skip
    section = own.section(Report.of(adapter_trace(), routing=check))
    assert section is not None
    assert section.headline == (
        "42\u202f% of tokens and 62\u202f% of texts go to the adapter of their own name; by chance "
        "it would be 33.3\u202f%."
    )
    assert section.body.count('class="strong"') == 3
    (line,) = section.plots
    assert line.data[0]["y"] == [0, 0.125, 0.25, 0.375]
    assert line.data[1]["y"] == [0.3333] * 4
    assert "The best layer is 3, with 38" in line.title
    assert own.section(Report.of(adapter_trace())) is None


def test_a_check_of_many_adapters_is_a_map():
    """A table would be too wide."""
    names = tuple(f"adapter {n}" for n in range(30))
    check = RoutingCheck(names, {names[0]: [1.0] + [0.0] * 29}, 1.0, 1.0)
    section = own.section(Report.of(adapter_trace(), routing=check))
    assert section is not None
    assert [plot.key for plot in section.plots] == ["own-map"]


def test_a_map_has_no_outlined_cells_to_speak_of():
    """What is said of the table is not said of the map."""
    names = tuple(f"adapter {n}" for n in range(30))
    few, many = (
        own.section(
            Report.of(
                adapter_trace(),
                routing=RoutingCheck(
                    experts, {experts[0]: [1.0] + [0.0] * (len(experts) - 1)}, 1, 1
                ),
            )
        )
        for experts in (NAMES, names)
    )
    assert few is not None
    assert many is not None
    assert "outlined" in few.reading
    assert "outlined" not in many.reading


def test_layers_that_are_alike_are_not_ranked():
    """With one adapter everything is as even at one layer as at another."""
    infos = tuple(
        SiteInfo(info.site, 1, 1, info.experts) for info in adapter_infos(3, names=("only",))
    )
    said = evenness.headline(Report.of(adapter_trace(infos)))
    assert said.startswith("Balance is 1.00 of 1 at every layer; the busiest adapter gets 1.0")


def test_an_answer_stands_below_its_prompt():
    """Where the text was kept: as text, its end where it is long."""
    strips = Report.of(adapter_trace()).strips
    asked = [replace(strip, prompt=f"<i>what</i>{'x' * 500} {n}") for n, strip in enumerate(strips)]
    page = Report.of(adapter_trace(), strips=asked).html()
    assert page.count('<p class="asked">… xxx') == len(strips)
    assert "<i>what</i>" not in page
    assert '<p class="asked">' not in Report.of(adapter_trace(), strips=strips).html()


def test_a_flow_chart_has_no_block_without_tokens():
    """plotly would drop it, and draw all blocks that follow in the places of others."""
    names = (*NAMES, "idle")
    infos = adapter_infos(4, names=names)
    trace = adapter_trace(infos)
    edited = [
        replace(chunk, decisions={site: _without(one, 3) for site, one in chunk.decisions.items()})
        for chunk in trace.chunks()
    ]
    page = data(Report.of(Trace(trace.meta, Memory(edited))).html())
    (chart,) = page["plots"]["flow-chart"]["data"]
    node, link = chart["node"], chart["link"]
    assert "idle" not in node["label"]
    assert {*link["source"], *link["target"]} == set(range(len(node["label"])))
    columns = sorted(set(node["x"]))
    for source, target in zip(link["source"], link["target"], strict=True):
        assert columns.index(node["x"][target]) == columns.index(node["x"][source]) + 1


def _without(decision: Decision, expert: int) -> Decision:
    gone = decision.indices == expert
    return Decision(decision.indices, decision.weights.masked_fill(gone, 0.0), decision.num_experts)
