"""Routers as people type them: `spectr score=energy top_k=1`, with typed values.

It reads words; which settings a router has is the business of `routers.table`.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from expertmix.errors import ConfigError
from expertmix.routers.router import Router
from expertmix.routers.table import make_router

BASE = "base"
"""In the place of a router: the base model alone."""

ORACLE = "oracle"
"""The router that is told each text's adapter: its label."""

_WORDS = {"none": None, "null": None, "true": True, "false": False}


@dataclass(frozen=True, slots=True)
class RouterSpec:
    """A router that was asked for.

    Attributes:
        kind: A key of `routers.table.ROUTERS`, or `base`.
        settings: KEY=VALUE, in order.
    """

    kind: str
    settings: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> RouterSpec:
        """Read `KIND KEY=VALUE …`.

        Raises:
            ConfigError: No word in it, or a quote that is not closed.
        """
        try:
            words = shlex.split(text)
        except ValueError as problem:
            raise ConfigError(f"cannot read the router {text!r}: {problem}") from problem
        if not words:
            raise ConfigError("a router needs a name, such as spectr")
        return cls(words[0], tuple(words[1:]))

    @property
    def name(self) -> str:
        """As people type it."""
        return " ".join((self.kind, *self.settings))

    def make(self, labels: Sequence[str | None]) -> Router | None:
        """The router; None for the base alone.

        Args:
            labels: Of the texts, in order, which the oracle is told.

        Raises:
            ConfigError: No such router or setting, or an oracle without labels.
        """
        if self.kind == BASE:
            self._refuse_settings("the model without adapters")
            return None
        if self.kind == ORACLE:
            self._refuse_settings("told by the labels of the prompts")
            return make_router(ORACLE, {"adapters": _told(labels)})
        return make_router(self.kind, parse_settings(self.settings))

    @property
    def top_k(self) -> int | None:
        """How many adapters it was told to choose, if it was told a number."""
        given = parse_settings(self.settings).get("top_k")
        return given if isinstance(given, int) else None

    def _refuse_settings(self, reason: str) -> None:
        if self.settings:
            raise ConfigError(f"{self.kind!r} is {reason}: it has no settings")


def _told(labels: Sequence[str | None]) -> tuple[str, ...]:
    names = tuple(label for label in labels if label is not None)
    if not names or len(names) < len(labels):
        raise ConfigError(
            "the oracle is told each text's adapter by its label, and there are texts without one: "
            'write {"text": …, "label": "an adapter\'s name"} in a .jsonl file'
        )
    return names


def parse_settings(pairs: Iterable[str]) -> dict[str, Any]:
    """KEY=VALUE to typed values: whole numbers, numbers, none, true, false, a,b,c, JSON, words.

    Raises:
        ConfigError: Not of that form, or a key twice.
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not (key.strip() and equals):
            raise ConfigError(f"{pair!r} is not KEY=VALUE, such as top_k=2")
        if key.strip() in found:
            raise ConfigError(f"setting {key.strip()!r} is given twice")
        found[key.strip()] = _value(key.strip(), value.strip())
    return found


def _value(key: str, text: str) -> Any:
    if text[:1] in ("[", "{"):
        try:
            return json.loads(text)
        except ValueError as problem:
            raise ConfigError(f"the value of {key!r} is not JSON: {problem}") from problem
    if "," in text:
        return [_word(part.strip()) for part in text.split(",") if part.strip()]
    return _word(text)


def _word(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
