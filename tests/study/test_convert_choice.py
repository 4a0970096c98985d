from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from expertmix.errors import ConfigError
from expertmix.study.convert_choice import Work, chosen


def choose(**options: Any) -> Work:
    given: dict[str, Any] = {
        "model": "m", "library": None, "out": Path("out"), "to": "moe", "texts": None,
        "router": None, "top_k": None, "iterations": None, "first_iteration_only": False,
    }  # fmt: skip
    return chosen(**{**given, **options})


def test_a_library_asks_for_a_moe_of_adapters():
    """As it always did, with the same defaults."""
    (job,) = choose(library="l").run.args
    assert (job.base, job.library, job.router, job.top_k) == ("m", "l", "logistic", 2)


def test_no_library_asks_for_a_chain_or_the_way_back():
    """By `to`; two iterations by default."""
    (job,) = choose(to="coe").run.args
    assert (job.to, job.iterations) == ("coe", 2)
    (job,) = choose(first_iteration_only=True).run.args
    assert (job.to, job.first_iteration_only) == ("moe", True)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"to": "coe", "library": "l"}, "make the MoE first"),
        ({"to": "coe", "router": "ridge"}, "--router goes with a library"),
        ({"to": "coe", "first_iteration_only": True}, "--first-iteration-only goes with --to moe"),
        ({"top_k": 2}, "--top-k goes with a library"),
        ({"iterations": 0}, "--iterations goes with --to coe"),
        ({"library": "l", "iterations": 2}, "--iterations goes with --to coe"),
        ({"library": "l", "first_iteration_only": True}, "goes with a CoE, without a library"),
    ],
)
def test_an_option_of_another_conversion_is_refused(options, says):
    """It would have no effect."""
    with pytest.raises(ConfigError, match=says):
        choose(**options)
