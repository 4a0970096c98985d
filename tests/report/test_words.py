"""Laws of numbers, tokens, colors, site names and markup."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmix.core.site import Site
from expertmix.errors import ConfigError
from expertmix.report import Table, palette, places, plots, words
from expertmix.report.markup import Html, script_data, sentence, tag, text


@pytest.mark.parametrize(
    ("share", "said"),
    [(0, "0"), (0.001, "<1"), (0.004999, "<1"), (0.5, "50"), (0.996, ">99"), (1, "100")],
)
def test_percent(share: float, said: str) -> None:
    """A small share is not zero, a large one not all."""
    assert words.percent(share) == f"{said}\u202f%"


def test_numbers() -> None:
    """Numbers have a real minus; a rounded zero has no sign; nan is a dash."""
    assert words.decimal(-1.5) == "\u22121.50"
    assert words.signed(0.5) == "+0.50"
    assert words.signed(-0.001) == words.decimal(-0.001) == "0.00"
    assert words.signed(-0.01) == "\u22120.01"
    assert (
        words.decimal(math.nan) == words.signed(math.nan) == words.percent(math.nan) == words.DASH
    )
    assert words.counted(1, "token") == "1 token"
    assert words.counted(1200, "token") == "1,200 tokens"
    assert words.rounded([0.123456, math.nan]) == [0.1235, None]


def test_lists() -> None:
    """Long lists are cut and say how much."""
    assert words.listed([]) == ""
    assert words.listed(["a"]) == "a"
    assert words.listed(["a", "b", "c"]) == "a, b and c"
    assert words.listed(["a", "b", "c"], most=2) == "a, b and 1 more"


@given(st.text(min_size=1))
def test_byte_level_tokens(value: str) -> None:
    """Whatever was written byte by byte reads as it was."""
    letter = {byte: sign for sign, byte in words._BYTE_OF.items()}
    token = "".join(letter[byte] for byte in value.encode())
    shown = words.readable_tokens([token, "Ġ"])[0]
    assert shown == value.replace("\r", "").replace("\n", "↵\n")


def test_other_tokens() -> None:
    """Sentencepiece marks become spaces; special tokens stay as they are."""
    assert words.readable_tokens(["▁the", "<0x0A>", "ing"]) == [" the", "↵\n", "ing"]
    assert words.readable_tokens(["Ġthe", "<|im_start|>", "你"]) == [" the", "<|im_start|>", "你"]
    assert words.readable_tokens(["café"]) == ["café"]


@pytest.mark.parametrize("count", [1, 8, 10, 11, 64, 256])
def test_colors(count: int) -> None:
    """Experts have different colors, and dark text can be read on the strongest tint of each."""
    colors = palette.expert_colors(count)
    assert len(set(colors)) == count
    for color in colors:
        strongest = palette.mix("#ffffff", color, 0.48)
        assert palette.contrast(palette.INK, strongest) >= 4.5


@given(st.floats(-0.5, 1.5))
def test_cells_can_be_read(place: float) -> None:
    """The text of a colored cell has the contrast that WCAG asks for."""
    for scale in (palette.SEQUENTIAL, palette.DIVERGING):
        background = palette.scale_color(scale, place)
        assert palette.contrast(palette.text_on(background), background) >= 4.5


def test_site_names() -> None:
    """A layer is its number; steps, odd names and single modules stay unique."""
    layers = [Site(f"model.layers.{number}.mlp") for number in range(3)]
    assert list(places.short_names(layers).values()) == ["0", "1", "2"]
    assert places.noun(places.short_names(layers)) == "layer"
    chain = [Site("model.layers.4.mlp", step) for step in range(2)]
    assert list(places.short_names(chain).values()) == ["4#0", "4#1"]
    alone = places.short_names([Site("orchestrator")])
    assert list(alone.values()) == ["orchestrator"]
    assert places.noun(alone) == "site"
    odd = [Site("encoder.mlp"), Site("decoder.layers.3.mlp"), Site("decoder.layers.3.moe")]
    assert len(set(places.short_names(odd).values())) == 3
    assert places.short_names([]) == {}


@given(st.text())
def test_markup(value: str) -> None:
    """Text never becomes a tag; HTML stays HTML."""
    assert "<" not in text(value)
    assert tag("p", {"title": value}, value).count("<") == 2
    assert "<" not in script_data({value: value})
    assert tag("p", {}, Html("<b>")) == "<p><b></p>"


def test_sentence() -> None:
    """Names between back quotes stand out, and are escaped all the same."""
    assert sentence("a `<b>`") == 'a <span class="name">&lt;b&gt;</span>'


@given(st.lists(st.sampled_from(["a" * 40, "a" * 50, "b", "<i>"]), min_size=1))
def test_axis_names(names: list[str]) -> None:
    """The categories of an axis are as many as its names, and hold no markup."""
    cut = plots.labels(names)
    assert len(set(cut)) == len(names)
    assert not any("<" in name for name in cut)


@pytest.mark.parametrize("count", [1, 11, 12, 48, 512, 5000])
def test_ticks(count: int) -> None:
    """An axis of numbers never has more names than fit on a telephone."""
    shown = plots.ticks([str(number) for number in range(count)])["tickvals"]
    assert 1 <= len(shown) <= 11
    assert shown[0] == "0"


def test_table() -> None:
    """Best cells are found per row, ties together; a row of the wrong length is an error."""
    table = Table("t", ("a", "b", "c"), (("x", 1.0, 1.0), ("y", 2.0, None)), best="lowest")
    assert table.best_columns(table.rows[0]) == {1, 2}
    assert table.best_columns(table.rows[1]) == frozenset()
    assert table.show(None) == words.DASH
    assert table.show(1234) == "1,234"
    with pytest.raises(ConfigError, match="row 0 has 1 cells for 2 columns"):
        Table("t", ("a", "b"), (("x",),))


def test_a_name_stands_out_whatever_it_holds() -> None:
    """Back quotes of its own do not end it."""
    shown = sentence(f"{words.named('a`b')} and {words.named('c')}")
    assert shown.count('<span class="name">') == 2
    assert "`" not in shown


def test_what_steers_a_terminal_is_a_mark() -> None:
    """Tabs, line breaks and letters stay."""
    assert words.printable("a\x1b[2J\x07\x9b\x7f\r") == "a\ufffd[2J\ufffd\ufffd\ufffd\ufffd"
    assert words.printable("ä\tb\n日本") == "ä\tb\n日本"


def test_long_names_are_cut() -> None:
    """To the length that there is room for, the mark included."""
    assert words.cut("abcdef", 6) == "abcdef"
    assert words.cut("abcdefg", 6) == "abcde…"


@pytest.mark.parametrize("rows", [3, 24, 60, 80, 100, 400])
def test_names_of_rows_never_touch(rows: int) -> None:
    """A map names as many rows as there is height for."""
    names = [f"adapter {n}" for n in range(rows)]
    _, layout = plots.heat_map(
        [[0.0]] * rows, columns=["a"], rows=names, column_title="x", hover="", top=1.0
    )
    shown = len(layout["yaxis"]["tickvals"])
    assert shown == rows or rows > 72
    assert (layout["height"] - 60) / shown >= layout["yaxis"].get("tickfont", {"size": 13})["size"]
