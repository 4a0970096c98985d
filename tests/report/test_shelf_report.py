"""Laws of the page about a shelf of adapters."""

from __future__ import annotations

import json
import re

import pytest
import torch

from expertmix.errors import OutputError
from expertmix.experts.lora import Adapter, Factors
from expertmix.experts.overlap import Overlap
from expertmix.experts.shelf import Shelf
from expertmix.report.shelf_report import ShelfReport
from expertmix.report.shelf_tables import adapters_table

MODULES = [
    f"model.layers.{layer}.mlp.{kind}_proj" for layer in range(12) for kind in ("up", "down")
]


def adapter(name: str, seed: int, modules: list[str] = MODULES, rank: int = 4) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    return Adapter(
        name,
        {
            module: Factors(
                torch.randn(rank, 12, generator=generator),
                torch.randn(10, rank, generator=generator),
                1.0,
            )
            for module in modules
        },
        "some-base",
    )


def report(*adapters: Adapter) -> ShelfReport:
    shelf = Shelf.of(adapters)
    return ShelfReport.of(shelf, Overlap.of(shelf))


def plots(page: str) -> dict:
    found = re.search(r'<script id="report-data"[^>]*>(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1])["plots"]


def test_the_page_has_every_picture() -> None:
    """Table, both overlaps, spectra and ranks; each chart has a place of its own on the page."""
    page = report(adapter("ann", 1), adapter("bob", 2), adapter("cat", 3, rank=2)).html()
    for key in ("adapters", "updates", "reads", "spectra", "ranks"):
        assert page.count(f'<section id="{key}"') == 1
    found = plots(page)
    assert set(found) == {"overlap-updates", "overlap-reads", "spectra-lines", "ranks-map"}
    for key in found:
        assert page.count(f'id="{key}"') == 1
    assert "adapters of some-base" in page


def test_maps_hold_the_measures() -> None:
    """Overlaps off the diagonal; effective ranks by layer in the model's order, 9 before 10."""
    one = report(adapter("ann", 1), adapter("bob", 2))
    found = plots(one.html())
    shown = found["overlap-updates"]["data"][0]["z"]
    assert shown[0] == [None, pytest.approx(float(one.overlap.updates[0, 1]), abs=1e-4)]
    ranks = found["ranks-map"]
    assert ranks["data"][0]["x"] == [str(layer) for layer in range(12)]
    assert ranks["data"][0]["z"][1][10] == pytest.approx(
        float(one.ranks.effective[1, 20:22].mean()), abs=0.01
    )
    assert len(ranks["choices"]) == 3  # all modules, and two kinds


def test_near_duplicates_have_a_section() -> None:
    """With both names; without any there is none."""
    ann = adapter("ann", 1)
    page = report(ann, adapter("bob", 2), Adapter("ann2", ann.factors)).html()
    assert '<section id="duplicates"' in page
    assert '<section id="duplicates"' not in report(ann, adapter("bob", 2)).html()


@pytest.mark.parametrize(
    "adapters",
    [
        [adapter("ann", 1)],
        [adapter("ann", 1, ["one"], rank=1)],
        [adapter("ann", 1, ["one"]), adapter("bob", 2, ["other"])],
        [Adapter("nil", {"one": Factors(torch.ones(2, 4), torch.zeros(3, 2), 1.0)})],
        [
            adapter("ann", 1),
            Adapter("nil", {"one": Factors(torch.ones(2, 4), torch.zeros(3, 2), 1.0)}),
        ],
    ],
    ids=["alone", "one direction", "nothing in common", "nothing at all", "one does nothing"],
)
def test_odd_shelves_have_a_page(adapters: list[Adapter]) -> None:
    """One adapter, rank 1, no common module, B = 0: a page and a table without nan."""
    one = report(*adapters)
    page = one.html()
    assert "nan" not in re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    plots(page)
    assert len(adapters_table(one.ranks, one.overlap).rows) == len(adapters)


def test_many_adapters_fit() -> None:
    """Of more than a hundred the maps show those that resemble another most; the page says so."""
    copies = [adapter(f"a{seed}", seed, ["one"], 1) for seed in range(104)]
    twins = [adapter("twin1", 500, ["one"], 1), adapter("twin2", 500, ["one"], 1)]
    one = report(*copies, *twins)
    assert len(one.shown) == 100
    assert {104, 105} <= set(one.shown)
    page = one.html()
    assert len(plots(page)["overlap-reads"]["data"][0]["z"]) == 100
    assert "Shown are the 100 adapters" in page


def test_names_are_text() -> None:
    """An adapter called like markup is shown, not run."""
    page = report(adapter("<b>x</b>", 1), adapter("bob", 2)).html()
    assert "<b>x</b>" not in page


def test_it_is_written_whole_or_not_at_all(tmp_path) -> None:
    """A page in its place; a folder in the way is told."""
    one = report(adapter("ann", 1))
    assert one.save(tmp_path / "page.html").read_text().startswith("<!DOCTYPE html>")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="cannot write"):
        one.save(tmp_path / "folder")
    assert {path.name for path in tmp_path.iterdir()} == {"page.html", "folder"}


def test_all_bases_are_named() -> None:
    """A shelf of adapters of several bases cannot pass for one of a single base."""
    other = Adapter("eve", adapter("eve", 3).factors, "other-base")
    page = report(adapter("ann", 1), adapter("bob", 2), other).html()
    assert "adapters of some-base and other-base" in page


def test_long_names_leave_room_for_numbers() -> None:
    """They are cut in a table; the whole name shows when it is pointed at."""
    name = "x" * 300
    page = report(adapter(name, 1), adapter("bob", 2)).html()
    assert f'title="{name}"' in page
    assert f">{name}<" not in page.replace('class="name">', "")
