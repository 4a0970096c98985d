"""Laws of the page about re-mixed routing."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import pytest

from expertmix.core.estimate import Estimate
from expertmix.errors import ConfigError, OutputError
from expertmix.report.remix_data import Move, Near, RemixItem, RemixLine, Turn
from expertmix.report.remix_moves import Moved
from expertmix.report.remix_report import RemixReport
from expertmix.report.remix_words import headline

from .test_report import BROWSER, browse  # noqa: F401  a fixture

SECRET = "who hid the golden teapot"
MOVE = Move(
    before=({0: 0.5, 1: 0.3}, {2: 0.6, 3: 0.2}),
    after=({0: 0.4, 2: 0.4}, {2: 0.5, 3: 0.3}),
    kl=(0.25, 0.0625),
)
TURN = Turn(neighbors=(Near("ref-1", 0.91, 0.75), Near("ref-2", 0.62, 0.25)), losses=(1.5, 1.25, 1),
            move=MOVE)  # fmt: skip


def item(number: int, method: str, before: int, after: int, **changes: object) -> RemixItem:
    """An item with three options, of which the first is right."""
    base, scores = ([-1.0 if n == best else -2.0 for n in range(3)] for best in (before, after))
    found = RemixItem(
        item=number, name=f"item-{number}", method=method, gold=0, base=tuple(base),
        scores=tuple(scores), correct=after == 0, base_correct=before == 0,
        loss=0.5 if after == 0 else 1.5, base_loss=0.5 if before == 0 else 1.5, turns=(TURN,),
    )  # fmt: skip
    return replace(found, **changes)


def line(method: str, kind: str, **changes: object) -> RemixLine:
    """A routing over four items."""
    found = RemixLine(
        method=method, kind=kind, items=4, accuracy=Estimate(0.5, 0.15, 0.85), loss=1.0,
        change=Estimate(0.0, -0.2, 0.2) if kind != "base" else Estimate(0.0), milliseconds=20.0,
        relative=2.0, dense=0.5, p=1.0, p_holm=1.0 if kind in ("method", "rival") else math.nan,
    )  # fmt: skip
    return replace(found, **changes)


BASE = line("base", "base", milliseconds=10.0, relative=1.0, p=math.nan, stages={"read": 10.0})
NGD = line(
    "ngd", "method", accuracy=Estimate(0.625, 0.31, 0.87), gained=7, lost=5, changed=4,
    stages={"read": 9.0, "solve": 8.0, "evaluate": 3.0}, settings="ngd, steps=2",
    change=Estimate(-0.125, -0.25, 0.0312), p=0.774, p_holm=0.774,
)  # fmt: skip
RANDOM = line("ngd, random neighbors", "control", of="ngd", changed=4)
WRONG = line("wrong_oracle", "bound", lost=2, p=0.5, changed=4)
ITEMS = [
    *(item(n, "base", b, b, turns=(Turn(),)) for n, b in enumerate((0, 0, 1, 1))),
    *(item(n, "ngd", b, a) for n, (b, a) in enumerate(((0, 0), (0, 2), (1, 0), (1, 1)))),
    *(item(n, "ngd, random neighbors", b, b) for n, b in enumerate((0, 0, 1, 1))),
]


def report(**changes: object) -> RemixReport:
    """A base, a method, its control and a bound."""
    found = RemixReport(
        title="Does it help?", model="some-model", task="4 items", items=ITEMS,
        lines=(BASE, WRONG, RANDOM, NGD), sites=("layer 1", "layer 2"), experts=tuple("abcd"),
        said=("ngd: nothing is shown.",), facts={"Fingerprint": "f00d"},
    )  # fmt: skip
    return replace(found, **changes)


def data(page: str) -> dict:
    found = re.search(r'<script id="report-data"[^>]*>(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1])["plots"]


def body(page: str) -> str:
    return re.sub(r"<(script|style)[^>]*>.*?</\1>", "", page, flags=re.DOTALL)


def rows(page: str, caption: str) -> list[list[str]]:
    """Cells of a table, its heading cells too."""
    table = re.search(rf"<table[^>]*><caption>{re.escape(caption)}.*?</table>", page, re.DOTALL)
    assert table is not None, caption
    found = re.findall(r"<tr>(.*?)</tr>", table[0], re.DOTALL)
    return [
        [re.sub(r"<[^>]*>", "", cell) for cell in re.findall(r"<t[hd].*?</t[hd]>", one, re.DOTALL)]
        for one in found
    ]


def section(page: str, key: str) -> str:
    found = re.search(rf'<section id="{key}".*?</section>', page, re.DOTALL)
    assert found is not None, key
    return found[0]


def test_numbers_in_the_table_are_those_of_the_lines() -> None:
    """Each with its interval, controls right below their method, bounds last."""
    found = rows(report().html(), "All routings")
    assert [row[0] for row in found[1:]] == ["base", "ngd", "ngd, random neighbors", "wrong_oracle"]
    assert found[2] == [
        "ngd", "method", "62.5\u202f% [31, 87]", "50.0\u202f%",
        "\u22120.125 [\u22120.250, +0.031]", "7", "5", "0.774", "0.774", "\u2013", "20.0",
        "2.00\u202f\u00d7",
    ]  # fmt: skip
    assert found[1][3:10] == ["\u2013"] * 7  # the base is compared with nothing


def test_plots_hold_the_numbers_of_the_lines() -> None:
    """Accuracy and its interval, change in loss, and milliseconds by stage."""
    found = data(report().html())
    dot = next(one for one in found["accuracy-dots"]["data"] if one["name"] == "method")
    assert dot["x"] == [62.5]
    assert dot["error_x"]["array"] == pytest.approx([24.5])
    assert dot["error_x"]["arrayminus"] == pytest.approx([31.5])
    change = next(one for one in found["loss-dots"]["data"] if one["name"] == "method")
    assert change["x"] == [-0.125]
    bars = {one["name"]: one["x"] for one in found["cost-bars"]["data"]}
    assert bars == {
        "read": [10.0, 9.0, 0, 0], "solve": [0, 8.0, 0, 0], "evaluate": [0, 3.0, 0, 0],
        "not told apart": [0, 0, 20.0, 20.0],
    }  # fmt: skip


def test_every_chart_has_its_place() -> None:
    """One element per chart, and a section per question."""
    page = report().html()
    for key in data(page):
        assert page.count(f'id="{key}"') == 1
    for key in ("comparison", "intervals", "flips", "pathway", "samples", "cost", "about"):
        assert page.count(f'<section id="{key}"') == 1


def test_flips_are_those_of_the_items() -> None:
    """By item and routing, both ways; items that no method flipped are not there."""
    page = report().html()
    assert rows(page, "Items whose answer")[1:] == [
        ["item-1", "lost", "", "\u2013"], ["item-2", "gained", "", "\u2013"],
    ]  # fmt: skip
    assert "turns 1 wrong answer right and 1 right answer wrong, of 4 items" in page


def test_maps_are_means_over_the_changed_items() -> None:
    """Before, after and their difference, by layer and expert; unchanged items do not count."""
    still = item(9, "ngd", 0, 0, turns=(Turn(reason="too far"),))
    page = report(items=[*ITEMS, still]).html()
    found = data(page)
    assert found["pathway-before-0"]["data"][0]["z"] == [[0.5, 0.3, 0, 0], [0, 0, 0.6, 0.2]]
    assert found["pathway-after-0"]["data"][0]["z"] == [[0.4, 0, 0.4, 0], [0, 0, 0.5, 0.3]]
    assert found["pathway-change-0"]["data"][0]["z"] == [[-0.1, -0.3, 0.4, 0], [0, 0, -0.1, 0.1]]
    first = rows(page, "How far routing moved")[1]
    assert first == ["layer 1", "0.662", "0.693", "0.2500", "1.00"]


def test_entropy_is_of_the_weights_as_shares() -> None:
    """−Σ p log p; the mass of a router does not matter."""
    moved = Moved.of([item(1, "ngd", 0, 0)], 4)
    assert moved is not None
    assert moved.entropy_after[0] == pytest.approx(math.log(2))
    assert moved.entropy_before[1] == pytest.approx(
        -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    )


def test_a_sample_shows_whom_it_learned_from_and_where_that_led() -> None:
    """Neighbors, loss per step, weights before and after, scores, the answer, in one section."""
    page = report().sample_html(1)
    assert "Right under the base, wrong now. Loss 0.500 → 1.500." in page
    assert rows(page, "Neighbors")[1:] == [
        ["ref-1", "0.910", "75\u202f%"], ["ref-2", "0.620", "25\u202f%"],
    ]  # fmt: skip
    assert "1.5000 before the first step, 1.0000 after step 2" in page
    assert rows(page, "Scores")[1] == [
        "option 1",
        "right",
        "\u22121.000",
        "\u22122.000",
        "\u22121.000",
    ]
    weights = rows(page, "Experts and their weights")
    assert weights[2] == ["layer 1, after", "0.69", "0.250", "a: 40\u202f%", "c: 40\u202f%"]
    assert 'class="strong">c: 40' in page  # came in


def test_samples_are_those_that_flipped_then_those_that_changed_most() -> None:
    """Both ways in turn, at most so many, and one that was left alone."""
    many = [
        item(n, "ngd", before, after, loss=n / 10)
        for n, (before, after) in enumerate([(0, 1)] * 3 + [(1, 0)] * 2 + [(1, 1)] * 10)
    ]
    alone = item(99, "ngd", 0, 0, turns=(Turn(reason="not fragile: margin 4 is above 3"),))
    found = report(items=[*many, alone], most=6).chosen("ngd")
    assert [one.flip for one in found[:5]] == ["gained", "lost", "gained", "lost", "lost"]
    assert found[-1] == alone
    page = report(items=[*many, alone], most=6).html()
    assert "Of 16 items 6 are shown per method" in page
    assert "Left alone, with the base&#x27;s routing: not fragile: margin 4 is above 3." in page


def test_no_text_unless_it_is_given() -> None:
    """Prompts and options are on the page only with `texts`."""
    texts = {n: (f"{SECRET} {n}", ("teapot a", "teapot b", "teapot c")) for n in range(4)}
    told = report(texts=texts)
    assert SECRET in told.html()
    assert "teapot b" in told.sample_html(2)
    assert "teapot" not in replace(told, texts=None).html()


def test_what_shifts_is_told_to_be_exact_at_one_layer() -> None:
    """Where a routing adds to the routers' logits: with the heat maps, and with each item."""
    told = "This routing shifts what the routers give: after is exact at layer 1;"
    assert told not in report().html()
    page = report(lines=(BASE, WRONG, RANDOM, replace(NGD, shifts=True))).html()
    assert told in section(page, "pathway")
    assert told in section(page, "samples")


def test_names_are_text() -> None:
    """Whatever an item, a reference, an expert, a reason or a method is called, it is shown."""
    evil = "<script>alert(1)</script>"
    turn = replace(TURN, neighbors=(Near(evil, 0.5, 1.0),), reason=evil)
    page = report(
        title=evil, model=evil, task=evil, experts=[evil] * 4, sites=[evil, f"{evil}2"],
        said=(evil,), facts={evil: evil}, texts={1: (evil, [evil] * 3)},
        lines=(BASE, replace(NGD, method=evil, settings=evil, refused={evil: 1}, doubted=(evil,))),
        items=[item(1, evil, 0, 2, name=evil, label=evil, turns=(turn,))],
    ).html()  # fmt: skip
    assert evil not in page
    assert "&lt;script&gt;alert(1)" in page


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "No method is shown to help. The largest difference"),
        ({"gained": 0, "lost": 0}, "No method is shown to help: no answer changed."),
        ({"p_holm": 0.04}, "`ngd` is shown to help: 62.5\u202f% right instead of 50.0\u202f%"),
        ({"p_holm": 0.04}, "at 2.0 times the base's time"),
        ({"p_holm": 0.04, "doubted": ("vote",)}, "It is not shown to be better than `vote`"),
        ({"p_holm": 0.04, "gained": 1}, "`ngd` is shown to harm (1 gained, 5 lost"),
        ({"p_holm": 0.05}, "may be chance"),
        ({"change": Estimate(-0.1, -0.2, -0.01)}, "Loss does fall"),
    ],
)
def test_the_headline_claims_what_the_test_carries(changes: dict, said: str) -> None:
    """A gain counts below 5 % after Holm's correction; controls that do as well are named."""
    found = headline([BASE, replace(NGD, **changes)])
    assert said in found
    if changes.get("p_holm", 1.0) >= 0.05:
        assert "`ngd` is shown to" not in found
        assert "No method is shown to help" in found


def test_controls_whose_loss_falls_are_named() -> None:
    """Beside a fall of a method's loss, so that it is not taken for what the neighbors taught."""
    falls = Estimate(-0.1, -0.2, -0.01)
    found = headline([BASE, replace(NGD, change=falls), replace(RANDOM, change=falls)])
    assert "It falls as well under the control `ngd, random neighbors`." in found


def test_a_headline_without_methods_claims_nothing() -> None:
    """Bounds and controls are no methods, whatever they gain."""
    found = headline([BASE, replace(WRONG, gained=50, p=0.0)])
    assert found == "No method was run beside the base, so nothing is claimed."


def free(change: Estimate) -> RemixReport:
    """Texts with one answer each."""
    none = Estimate(math.nan)
    lines = [
        replace(one, accuracy=none, dense=math.nan, gained=0, lost=0, p=math.nan, p_holm=math.nan)
        for one in (BASE, NGD)
    ]
    lines[1] = replace(lines[1], change=change)
    items = [
        item(n, one.method, 0, 0, base=(-2.0,), scores=(-1.5,), correct=None, base_correct=None)
        for one in lines for n in range(4)
    ]  # fmt: skip
    return report(lines=lines, items=items)


def test_free_texts_speak_of_losses() -> None:
    """Without a choice there is no accuracy, no flip and no gold option on the page."""
    page = free(Estimate(-0.2, -0.3, -0.1)).html()
    assert '<span class="name">ngd</span> is shown to lower the loss, by 0.200 nats' in page
    assert "loss-dots" in data(page)
    assert "accuracy-dots" not in data(page)
    assert '<section id="flips"' not in page
    assert rows(page, "All routings")[0] == [
        "routing", "kind", "loss", "change in loss [95 %]", "changed", "ms", "cost",
    ]  # fmt: skip
    assert rows(page, "Scores")[0] == ["option", "base", "new", "change"]
    assert "No method is shown to lower the loss." in free(Estimate(-0.2, -0.4, 0.1)).html()


def odd_pages() -> dict[str, RemixReport]:
    refused = Turn(neighbors=TURN.neighbors, reason="too far: 2 > 1")
    return {
        "the base alone": report(lines=(BASE,), items=ITEMS[:4]),
        "one method": report(lines=(BASE, NGD), items=ITEMS[:8]),
        "bounds only": report(lines=(BASE, WRONG)),
        "no items": report(items=()),
        "no flips": report(items=[item(1, "ngd", 0, 0)]),
        "all refused": report(
            lines=(BASE, replace(NGD, changed=0, refused={"too far: 2 > 1": 4})),
            items=[item(n, "ngd", 0, 0, turns=(refused,)) for n in range(4)],
        ),
        "no neighbors": report(items=[item(1, "ngd", 0, 0, turns=(Turn(reason="no neighbors"),))]),
        "several orders": report(items=[item(1, "ngd", 0, 1, turns=(TURN, TURN, refused))]),
        "not finite": report(
            items=[
                item(
                    1,
                    "ngd",
                    0,
                    1,
                    scores=(math.nan, -1.0, -math.inf),
                    loss=math.nan,
                    turns=(replace(TURN, losses=(1.0, math.nan)),),
                )
            ],
        ),
        "no time": report(lines=(replace(BASE, milliseconds=0.0), replace(NGD, relative=math.nan))),
        "free": free(Estimate(0.0, -0.1, 0.1)),
    }


@pytest.mark.parametrize("name", list(odd_pages()))
def test_odd_runs_have_a_page(name: str) -> None:
    """Nothing that is not a number is shown as one, and the data can be read."""
    page = odd_pages()[name].html()
    assert not re.search(r"\b(nan|inf|None)\b", re.sub(r"<[^>]*>", " ", body(page)))
    data(page)


def test_the_wrong_label_oracle_is_explained() -> None:
    """Beside the table, and only where it was run."""
    page = report().html()
    assert "the model can be steered" in section(page, "comparison")
    assert "makes 2 of 2 right answers fall (p\xa0=\xa00.500)" in page
    assert "can be steered" not in report(lines=(BASE, NGD)).html()


def test_a_reason_is_counted_without_its_numbers() -> None:
    """Refusals that differ only in a distance are one."""
    refused = {"too far: at 2.1": 3, "too far: at 2.4": 2, "no neighbors": 1}
    assert "too far (5) and no neighbors (1)" in report(
        lines=(BASE, replace(NGD, refused=refused))
    ).html()  # fmt: skip


def test_what_cannot_be_shown_is_told(tmp_path) -> None:
    """A page without a base, an item that is not there, a folder in the way of the file."""
    with pytest.raises(ConfigError, match="base's line"):
        report(lines=(NGD,))
    with pytest.raises(ConfigError, match="no item 77 under 'ngd'"):
        report().sample_html(77)
    assert report().save(tmp_path / "page.html").read_text().startswith("<!DOCTYPE html>")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="cannot write"):
        report().save(tmp_path / "folder")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_in_a_browser(browse) -> None:  # noqa: F811
    """Every chart is drawn, also those that a menu hides, and the console is empty."""
    page = report().html()
    document, console = browse(page)
    assert console == ""
    assert document.count("plot js-plotly-plot") == len(data(page))
