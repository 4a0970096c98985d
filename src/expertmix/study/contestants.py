"""All that is run on a task: the base, methods, their controls, and bounds: `Contestant`.

Says what each of them is called and what it stands for; runs nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from expertmix.errors import ConfigError
from expertmix.optimize.problem import Method
from expertmix.optimize.table import line_of, make_method, method_of, settings_of

Kind = Literal["base", "method", "control", "bound"]
"""`bound` is what needs the label: it is no method, and no control either."""

Twist = Literal["", "random neighbors", "shuffled labels", "neighbor vote", "in-context learning"]
"""What is done to the references before a method sees them, or in a method's place."""

_BOUNDS = ("oracle", "wrong_oracle")
_WITHOUT_NEIGHBORS = (*_BOUNDS, "context", "global_delta", "router_tuning")
_OWN_NEIGHBORS = ("mode_finding",)  # it looks for them among pathways, so embeddings do not matter
_WITHOUT_LABELS = (*_BOUNDS, "context")


@dataclass(frozen=True, slots=True)
class Contestant:
    """One way to route all items of a task.

    Attributes:
        name: In tables and rows.
        kind: What it stands for.
        method: Finds pathways; None for the base, and for what is no routing at all.
        twist: What makes it a control.
        seed: Of the twist.
    """

    name: str
    kind: Kind
    method: Method | None = None
    twist: Twist = ""
    seed: int = 0

    @property
    def chooses(self) -> bool:
        """Whether it needs options to choose from."""
        return self.twist in ("neighbor vote", "shuffled labels") or self.name == "wrong_oracle"

    @property
    def edits(self) -> bool:
        """Whether an intervention comes out."""
        return self.method is not None

    @property
    def file(self) -> str:
        """Its name as that of a file."""
        return re.sub(r"[^\w.=-]+", "-", self.name)

    @property
    def line(self) -> str:
        """Everything that decides what it does."""
        settings = "" if self.method is None else repr(sorted(settings_of(self.method).items()))
        return f"{self.name} {settings} {self.seed if self.twist else ''}".strip()

    def figures(self) -> dict[str, Any]:
        """JSON-ready."""
        settings = None if self.method is None else settings_of(self.method)
        return {"name": self.name, "kind": self.kind, "settings": settings}


def contestants(
    main: str, against: Sequence[str] = (), *, controls: bool = True, seed: int = 0
) -> list[Contestant]:
    """The base, the methods in order, their controls, and the bounds.

    A method that uses neighbors is also run with random ones, and with its references' labels
    shuffled. Once each there are the neighbors' vote, in-context learning with the same neighbors,
    one global delta, the oracle and the wrong-label oracle.

    Args:
        main: A method as a line, such as `ngd steps=5`.
        against: More of them.
        controls: Whether controls and bounds are run too.
        seed: Of what is random in controls.

    Raises:
        ConfigError: An unknown method or setting, or one that is named twice.
    """
    methods: dict[str, Method] = {}
    for line in (main, *against):
        made = method_of(line)
        if line_of(made) in methods:
            raise ConfigError(
                f"method {line_of(made)!r} is named twice: it is compared with itself"
            )
        methods[line_of(made)] = made
    runs = [Contestant("base", "base")]
    runs += [Contestant(name, _kind(made), made) for name, made in methods.items()]
    return [*runs, *_controls(methods, seed)] if controls else runs


def _kind(method: Method) -> Kind:
    return "bound" if method.name in _BOUNDS else "method"


def _controls(methods: dict[str, Method], seed: int) -> Iterator[Contestant]:
    for name, method in methods.items():
        twists: list[Twist] = []
        if method.name not in (*_WITHOUT_NEIGHBORS, *_OWN_NEIGHBORS):
            twists.append("random neighbors")
        if method.name not in _WITHOUT_LABELS:
            twists.append("shuffled labels")
        for twist in twists:
            yield Contestant(f"{name}, {twist}", "control", method, twist, seed)
    yield Contestant("neighbor vote", "control", twist="neighbor vote")
    yield Contestant("in-context learning", "control", twist="in-context learning")
    for name, kind in (("global_delta", "control"), *((one, "bound") for one in _BOUNDS)):
        if name not in methods:
            yield Contestant(
                name, "control" if kind == "control" else "bound", make_method(name, {})
            )
