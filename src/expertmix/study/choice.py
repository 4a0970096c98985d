"""Choice questions as text: `Item`, and what must hold of a set of them before anything runs.

Knows no file, no token and no model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from expertmix.errors import ConfigError

CUE = "\nAnswer:"
"""Ends a question whose options are answers, and not the question's own continuation."""


@dataclass(frozen=True, slots=True)
class Item:
    """A question, what may follow it, and what is right.

    Attributes:
        query: The question or the begun text, without the cue and without its options.
        choices: The options as texts: several, or the one answer of a free text.
        gold: Number of the right one.
        cue: What stands between the query and an option: `CUE`, or nothing where an option goes
            on with the query.
        name: In results; unique in a set.
        label: Its group, such as a subject, or None.
        where: File and line, for messages.
        free: Whether it is a text with its one answer.
    """

    query: str
    choices: tuple[str, ...]
    gold: int
    cue: str = ""
    name: str = ""
    label: str | None = None
    where: str = ""
    free: bool = False

    @property
    def prompt(self) -> str:
        """All that stands before an option."""
        return self.query + self.cue


@dataclass(frozen=True, slots=True)
class LeftOut:
    """An item that is not asked.

    Attributes:
        item: The item.
        reason: Why not.
    """

    item: Item
    reason: str

    def __str__(self) -> str:
        return f"{self.item.where}: {self.reason}"


def sift(items: Iterable[Item], *, strict: bool = False) -> tuple[list[Item], list[LeftOut]]:
    """Items that can be asked, and those that cannot be decided: twins, and equal choices.

    Public sets have a few of them (seven of arc_easy's test items have two equal choices), so they
    are left out and told. What is broken is refused.

    Args:
        items: In order.
        strict: Refuse what would be left out.

    Raises:
        ConfigError: An item has no choice, one only, or a blank one; the right one is not among
            them; two items have the same name; nothing is left; or, when `strict`, anything would
            be left out.
    """
    kept: list[Item] = []
    left: list[LeftOut] = []
    seen: dict[tuple[str, ...], str] = {}
    for item in items:
        check(item)
        first = seen.setdefault((item.prompt, *item.choices), item.where)
        reason = _undecidable(item, first)
        if reason and strict:
            raise ConfigError(f"{item.where}: {reason}. Remove the item, or allow leaving it out.")
        if reason:
            left.append(LeftOut(item, reason))
        else:
            kept.append(item)
    if not kept:
        told = f": {left[0]}" if left else ""
        raise ConfigError(f"no item to ask is left of {len(left)}{told}")
    _check_names(kept)
    return kept, left


def check(item: Item) -> None:
    """Refuse an item that is broken.

    Raises:
        ConfigError: As `sift` says.
    """
    if not item.prompt.strip():
        raise ConfigError(f"{item.where}: the question is blank")
    if not item.choices:
        raise ConfigError(f"{item.where}: no choices: an item needs two at least")
    if len(item.choices) == 1 and not item.free:
        raise ConfigError(
            f"{item.where}: one choice only, so there is nothing to choose. Give two or more, or "
            f"write a text with its one answer as `prompt` and `answer`."
        )
    for number, choice in enumerate(item.choices):
        if not choice.strip():
            raise ConfigError(f"{item.where}: choice {number} is blank")
    if not 0 <= item.gold < len(item.choices):
        raise ConfigError(
            f"{item.where}: gold is {item.gold}, and there are choices 0 to {len(item.choices) - 1}"
        )


def _undecidable(item: Item, first: str) -> str:
    if first != item.where:
        return f"the same item as {first}"
    seen: dict[str, int] = {}
    for number, choice in enumerate(item.choices):
        before = seen.setdefault(" ".join(choice.split()), number)
        if before != number:
            return f"choices {before} and {number} are the same text {choice.strip()[:40]!r}"
    return ""


def _check_names(items: Sequence[Item]) -> None:
    seen: dict[str, str] = {}
    for item in items:
        before = seen.setdefault(item.name, item.where)
        if before != item.where:
            raise ConfigError(f"{item.where} and {before} are both named {item.name!r}")
