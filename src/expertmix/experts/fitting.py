"""Routers that look at some text first: `Ridge` needs to know whose it is, `Calibrated` does not.

The base model reads the texts once; nothing is trained. Hooks only, gone afterwards.

Legend: B rows, S columns, D width of a module's input, T tokens, E adapters.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from expertmix.errors import ConfigError, UnsupportedModelError
from expertmix.experts.base_inputs import read, showing
from expertmix.experts.places import Place, find_places, pretrained
from expertmix.experts.plan import Plan
from expertmix.experts.shared_input import groups
from expertmix.experts.shelf import Shelf
from expertmix.routers.calibrated import Spread
from expertmix.routers.pooled import calibrated, measured
from expertmix.routers.ridge import LinearMap, Moments, Ridge
from expertmix.routers.router import Router


def fit_ridge(
    model: nn.Module,
    shelf: Shelf,
    texts: Mapping[str, Sequence[Tensor]],
    *,
    penalty: float = 1e-2,
    top_k: int | None = 2,
    temperature: float = 0.1,
) -> Ridge:
    """A ridge router for a shelf, from some text of each adapter.

    Fit it before the shelf is put on the model: the base's own hidden states are what counts.

    Args:
        model: The base model.
        shelf: The adapters.
        texts: Per adapter token ids, each (B, S) without padding; a few hundred tokens are enough.
        penalty: Of the regression, relative to the mean square of each module's input.
        top_k: Adapters per token.
        temperature: Of the softmax over them.

    Raises:
        CheckpointError: The shelf does not fit the model.
        ConfigError: An adapter has no text, or a text belongs to no adapter.
        UnsupportedModelError: Modules that should share an input do not.
    """
    if unknown := set(texts) - set(shelf.names):
        raise ConfigError(f"texts for {min(unknown)!r}, which is not on the shelf")
    counts = [sum(ids.numel() for ids in texts.get(name, ())) for name in shelf.names]
    base = pretrained(model)
    places = find_places(base, shelf)
    reader = _Reader(places, counts)
    with showing(places, reader.see):
        for expert, name in enumerate(shelf.names):
            reader.expert = expert
            read(base, texts[name])
    return Ridge(reader.solve(penalty), top_k, temperature)


class _Reader:
    """Moments of what modules read, kept once for modules that read the same tensor.

    Attributes:
        expert: The adapter whose text is being read.
    """

    def __init__(self, places: Sequence[Place], counts: Sequence[int]) -> None:
        self.expert = 0
        widths = {place.name: place.width for place in places}
        self._groups = {members[0]: members for members in groups(widths)}
        self._first = {name: members[0] for members in self._groups.values() for name in members}
        self._moments = {first: Moments(widths[first], counts) for first in self._groups}
        self._latest: dict[str, Any] = {}

    def see(self, module: str, hidden: Tensor) -> None:
        """Add a module's input.

        Raises:
            UnsupportedModelError: Modules that should share an input do not.
        """
        first = self._first[module]
        if module == first:
            self._moments[first].add(hidden.reshape(-1, hidden.shape[-1]), self.expert)
            self._latest[first] = weakref.ref(hidden)
        elif self._latest[first]() is not hidden:
            raise UnsupportedModelError(
                f"{module} reads another tensor than {first}, unlike in the models that are known "
                f"here: a ridge router cannot be fitted"
            )

    def solve(self, penalty: float) -> dict[str, LinearMap]:
        """A map per module."""
        maps: dict[str, LinearMap] = {}
        for first, members in self._groups.items():
            maps.update(dict.fromkeys(members, self._moments[first].solve(penalty)))
        return maps


def calibrate(model: nn.Module, shelf: Shelf, router: Router, texts: Sequence[Tensor]) -> Router:
    """A router whose scores are comparable between adapters, from any unlabelled text.

    Args:
        model: The base model, without the shelf on it.
        shelf: The adapters.
        router: Whose scores are calibrated, or whose evidence if it pools any.
        texts: Token ids, each (B, S) without padding.

    Raises:
        CheckpointError: The shelf does not fit the model.
        ConfigError: The texts hold fewer than two tokens, or are no token ids.
        UnsupportedModelError: An adapted module does not run.
    """
    base = pretrained(model)
    inner = measured(router)
    plan = Plan.lay(base, shelf, inner, "outputs")
    spreads = {place.name: Spread(len(shelf)) for place in plan.places}

    def see(module: str, hidden: Tensor) -> None:
        spreads[module].add(inner.scores(plan.seen(module, hidden)))

    with showing(plan.places, see):
        read(base, texts)
    idle = [module for module, spread in spreads.items() if not spread.count]
    if 0 < len(idle) < len(spreads):
        raise UnsupportedModelError(
            f"module {idle[0]!r} did not run while the base read the text: its layer computes "
            f"without calling it, or gave it no token, and adapters there have no level. Leave "
            f"that module out of the adapters, or give more text"
        )
    return calibrated(router, {module: spread.level() for module, spread in spreads.items()})
