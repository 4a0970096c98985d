from __future__ import annotations

import pytest

from expertmix.errors import ConfigError
from expertmix.routers.fixed import Fixed
from expertmix.routers.oracle import Oracle
from expertmix.routers.spectr import SpectR
from expertmix.study.settings import RouterSpec, parse_settings


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3), ("0.5", 0.5), ("1e-3", 0.001), ("none", None), ("None", None), ("true", True),
        ("False", False), ("energy", "energy"), ("input,rank", ["input", "rank"]), ("1,2", [1, 2]),
        ("input,", ["input"]), ('["a", 2]', ["a", 2]), ('{"ada": 0.5}', {"ada": 0.5}), ("", ""),
        ("a=b", "a=b"),
    ],
)  # fmt: skip
def test_values_are_typed(text, value):
    """Whole numbers, numbers, none, truth values, lists, JSON, and words."""
    found = parse_settings([f"key={text}"])
    assert found == {"key": value}
    assert type(found["key"]) is type(value)


@pytest.mark.parametrize(
    ("pairs", "says"),
    [
        (["top_k"], "'top_k' is not KEY=VALUE"),
        (["=3"], "'=3' is not KEY=VALUE"),
        (["a=1", "a=2"], "setting 'a' is given twice"),
        (["a=[1,"], "the value of 'a' is not JSON"),
    ],
)
def test_what_is_no_setting_is_told(pairs, says):
    """With what it should look like."""
    with pytest.raises(ConfigError, match=r"not KEY=VALUE|twice|not JSON") as caught:
        parse_settings(pairs)
    assert says in str(caught.value)


def test_a_router_with_its_settings():
    """As it is typed; its name says them again."""
    spec = RouterSpec.parse("spectr score=energy top_k=none normalize=input,size")
    assert spec.make([]) == SpectR(score="energy", top_k=None, normalize=("input", "size"))
    assert spec.name == "spectr score=energy top_k=none normalize=input,size"
    assert RouterSpec.parse("fixed weights='{\"ada\": 0.5}'").make([]) == Fixed({"ada": 0.5})


def test_the_base_is_no_router():
    """It has no settings either."""
    assert RouterSpec.parse("base").make([]) is None
    with pytest.raises(ConfigError, match="has no settings"):
        RouterSpec.parse("base top_k=1").make([])


def test_an_oracle_is_told_the_labels():
    """Of every text; otherwise it says what is missing."""
    assert RouterSpec.parse("oracle").make(["ada", "bob"]) == Oracle(("ada", "bob"))
    for labels in ([], [None], ["ada", None]):
        with pytest.raises(ConfigError, match="by its label"):
            RouterSpec.parse("oracle").make(labels)


@pytest.mark.parametrize("text", ["", "  ", "fixed weights='ada"])
def test_words_that_cannot_be_read_are_told(text):
    """None at all, or an open quote."""
    with pytest.raises(ConfigError, match=r"needs a name|cannot read"):
        RouterSpec.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "spectr normalize=none", "spectr normalize=3", "fixed weights=1,0,0", "lag m=some",
        "fixed weights=ada,bob", "pooled evidence=1,2",
    ],
)  # fmt: skip
def test_a_value_of_another_type_is_told(text):
    """Whatever a router does with it."""
    with pytest.raises(ConfigError):
        RouterSpec.parse(text).make([])


def test_the_adapters_of_an_oracle_are_the_labels_alone():
    """Two sources could contradict each other."""
    with pytest.raises(ConfigError, match="told by the labels of the prompts: it has no settings"):
        RouterSpec.parse("oracle adapters=ada,bob").make(["ada", "bob"])


@pytest.mark.parametrize(
    ("text", "number"), [("spectr top_k=2", 2), ("lag", None), ("lag top_k=none", None)]
)
def test_how_many_adapters_were_asked_for(text, number):
    """None where the router decides."""
    assert RouterSpec.parse(text).top_k == number
