"""The command line as a user meets it, on tiny models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from study.conftest import (  # noqa: F401  fixtures
    adapters,
    asked,
    base,
    dense,
    foreign,
    library,
    locked,
    moe,
    other_moe,
    pickled,
    plain,
    prompts,
)
from typer.testing import CliRunner

from expertmix.cli.app import app


@dataclass(frozen=True)
class Answer:
    """What a command left behind."""

    code: int
    out: str
    err: str


@pytest.fixture
def expertmix() -> Callable[..., Answer]:
    """Run a command; arguments of any type."""

    def call(*args: object) -> Answer:
        result = CliRunner().invoke(app, [str(arg) for arg in args])
        known = result.exception is None or isinstance(result.exception, SystemExit)
        assert known, f"{result.exception!r} was not caught"
        return Answer(result.exit_code, result.stdout, result.stderr)

    return call
