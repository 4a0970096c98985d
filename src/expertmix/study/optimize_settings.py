"""The settings of `expertmix optimize`: `OptimizeJob`. Says what is asked for; checks no file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeVar

from expertmix.bindings.critical import Layers
from expertmix.errors import ConfigError
from expertmix.optimize.gate import Gate
from expertmix.optimize.neighbors import Neighbors
from expertmix.study.choice_prompts import Style, StyleName, Units
from expertmix.study.names import Dtype
from expertmix.study.settings import parse_settings

ROUTER = "pooled"
"""Of adapters, by default."""

Made = TypeVar("Made", Neighbors, Gate)


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizeJob:
    """A model, questions to answer, and questions whose answers are known.

    Attributes:
        model: Hub id, folder, `default` or `default-moe`.
        task: A file of choice questions, or the name of a public set.
        reference: The same, of questions to learn from; or the folder of a reference set.
        method: `NAME`, or `NAME KEY=VALUE …`.
        settings: Further KEY=VALUE for it.
        against: Methods to compare with, in the same form.
        controls: Run the controls beside each method, and the oracles.
        adapters: A library of LoRA adapters that are composed on the model; their routing is then
            what is optimized.
        router: Of the adapters.
        layers: Critical layers, such as `last 5`.
        decisions: How many tokens of a prompt's end are decision tokens.
        scored: Whether the options' tokens are decision tokens too.
        k: Neighbors of an item.
        near: Further settings KEY=VALUE of `optimize.neighbors.Neighbors`.
        gate: Settings KEY=VALUE of `optimize.gate.Gate`, which leaves items alone.
        style: How items are put to the model.
        units: What an option's log-probability is divided by.
        permute: In style letters, ask every cyclic shift of the options.
        limit: Items of the task, drawn with the seed; None for all.
        reference_limit: The same of the references.
        batch_size: Items per batch.
        seed: Of draws and shifts.
        out: Results folder; its files are replaced. None writes nothing.
        text: Keep questions and answers in what is written.
        interventions: Write each method's pathways as interventions too.
        report: Write the page.
        restart: Discard what an unfinished run left in the folder.
        dtype: Of the weights.
        device: Where to run.
    """

    model: str
    task: str
    reference: str
    method: str = "ngd"
    settings: tuple[str, ...] = ()
    against: tuple[str, ...] = ()
    controls: bool = True
    adapters: str | None = None
    router: str = ROUTER
    layers: str = "last 5"
    decisions: int = 1
    scored: bool = False
    k: int = 3
    near: tuple[str, ...] = ()
    gate: tuple[str, ...] = ()
    style: StyleName = "text"
    units: Units = "none"
    permute: bool = True
    limit: int | None = None
    reference_limit: int | None = None
    batch_size: int = 16
    seed: int = 0
    out: Path | None = None
    text: bool = False
    interventions: bool = False
    report: bool = True
    restart: bool = False
    dtype: Dtype = "auto"
    device: str = "auto"

    @property
    def main(self) -> str:
        """The method as one line."""
        return " ".join((self.method, *self.settings))

    @property
    def asking(self) -> Style:
        """How items are put."""
        return Style(self.style, self.units, self.permute)

    @property
    def where(self) -> Layers:
        """The critical layers: numbers with commas between them are numbers."""
        if not re.fullmatch(r"\s*\d+(\s*,\s*\d+)*\s*", self.layers):
            return self.layers
        return [int(number) for number in self.layers.split(",")]

    @property
    def neighbors(self) -> Neighbors:
        """Who counts as a neighbor."""
        return made(Neighbors, (f"k={self.k}", *self.near), "neighbors")

    @property
    def keeping(self) -> Gate:
        """Which items are left alone."""
        return made(Gate, self.gate, "the gate")


def made(kind: type[Made], pairs: Sequence[str], what: str) -> Made:
    """Settings KEY=VALUE as what they are settings of.

    Raises:
        ConfigError: An unknown key, or a value that is not possible.
    """
    given = parse_settings(pairs)
    known = [one.name for one in fields(kind)]
    unknown = [key for key in given if key not in known]
    if unknown:
        raise ConfigError(f"{what} has no setting {unknown[0]!r}; it has {', '.join(known)}")
    try:
        return kind(**given)
    except TypeError as problem:
        raise ConfigError(
            f"{what}: a setting has a value of the wrong kind: {problem}"
        ) from problem
