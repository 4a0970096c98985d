from __future__ import annotations

import pytest

from expertmix.errors import ConfigError
from expertmix.study.choice import Item, sift

from .choosing import item


def test_what_can_be_asked_is_kept_in_order():
    """Nothing is changed, nothing is left out without a reason."""
    items = [item(n) for n in range(5)]
    assert sift(items) == (items, [])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"choices": ()}, "no choices"),
        ({"choices": ("one",)}, "one choice only"),
        ({"choices": ("one", " ")}, "choice 1 is blank"),
        ({"gold": 3}, "gold is 3, and there are choices 0 to 2"),
        ({"gold": -1}, "gold is -1"),
        ({"query": " ", "cue": ""}, "the question is blank"),
    ],
)
def test_a_broken_item_is_refused_with_its_place(changes, said):
    """Before anything runs: no choices, one only, a blank one, a right one that is not there."""
    with pytest.raises(ConfigError, match=said) as raised:
        sift([item(1), item(2, **changes)])
    assert str(raised.value).startswith("items.jsonl:2: ")


def test_a_text_with_its_one_answer_has_nothing_to_choose():
    """It is no broken item."""
    text = Item("def f(x):", ("return x",), 0, name="f", where="f.jsonl:1", free=True)
    assert sift([text]) == ([text], [])


def test_what_cannot_be_decided_is_left_out_and_named():
    """A twin of an earlier item, and two choices that are the same text; strict refuses them."""
    twin = item(1, name="twin", where="items.jsonl:7")
    equal = item(2, choices=("a  b", "a b ", "c"))
    kept, left = sift([item(1), twin, equal])
    assert kept == [item(1)]
    assert [str(one) for one in left] == [
        "items.jsonl:7: the same item as items.jsonl:1",
        "items.jsonl:2: choices 0 and 1 are the same text 'a b'",
    ]
    with pytest.raises(ConfigError, match="the same item as"):
        sift([item(1), twin], strict=True)


def test_an_empty_set_is_refused():
    """Also one of which nothing is left."""
    with pytest.raises(ConfigError, match="no item to ask is left"):
        sift([])
    with pytest.raises(ConfigError, match="choices 0 and 1 are the same"):
        sift([item(1, choices=("a", "a"))])


def test_two_items_of_one_name_are_refused():
    """Results are told by name."""
    with pytest.raises(ConfigError, match="both named 'x'"):
        sift([item(1, name="x"), item(2, name="x")])
