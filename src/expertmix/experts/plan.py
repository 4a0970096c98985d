"""What is on a model at one time: a shelf, a router, and where the adapters act.

Frozen as a whole, so that changing a live model is one assignment, and a request that started
before keeps the plan it started with. Touches no module.

Legend: T tokens, D width of a module's input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from expertmix.core.protocols import Tap
from expertmix.core.site import Site, SiteInfo
from expertmix.errors import ConfigError
from expertmix.experts.choice import choose, chooses_again
from expertmix.experts.fused import Combination, combine
from expertmix.experts.places import Place, find_places
from expertmix.experts.shared_input import SharedInput, groups
from expertmix.experts.shelf import Shelf
from expertmix.experts.stack import Projections, Reading
from expertmix.routers.memory import Memory
from expertmix.routers.router import Router
from expertmix.routers.seen import Seen


@dataclass(frozen=True, eq=False)
class Plan:
    """A shelf and a router, laid out for one model.

    Attributes:
        shelf: The adapters.
        router: Who decides.
        combination: How outputs combine.
        projections: How inputs are projected (see `stack.Projections`).
        places: Modules at which something is added, in the model's order.
        infos: A site per place.
        inputs: Per place the product that it shares with others.
    """

    shelf: Shelf
    router: Router
    combination: Combination
    projections: Projections
    places: tuple[Place, ...]
    infos: Mapping[str, SiteInfo]
    inputs: Mapping[str, SharedInput]

    @classmethod
    def lay(
        cls,
        model: nn.Module,
        shelf: Shelf,
        router: Router,
        combination: Combination,
        projections: Projections = None,
    ) -> Plan:
        """Check that all of it fits, and lay it out.

        Raises:
            CheckpointError: An adapter does not fit the model.
            ConfigError: The router does not fit the shelf, or an unknown combination.
        """
        if combination not in ("outputs", "aligned"):
            raise ConfigError(f"combination must be outputs or aligned: {combination!r}")
        _check(projections)
        places = find_places(model, shelf)
        names = [place.name for place in places]
        router.check(shelf.names, names)
        infos = {name: _info(name, shelf, router) for name in names}
        inputs = _shared_inputs(
            shelf, places, Reading(router.whole, projections, again=not router.remembers)
        )
        return cls(shelf, router, combination, projections, places, infos, inputs)

    def added(
        self, module: str, hidden: Tensor, taps: Sequence[Tap], memory: Memory | None = None
    ) -> Tensor | None:
        """(T, out) what the selected add at a module for a (…, D) input; None elsewhere."""
        if module not in self.infos:
            return None
        info = self.infos[module]
        seen = self.seen(module, hidden, exact=chooses_again(taps, info.site))
        seen.memory = memory
        indices_TK, weights_TK = choose(self.router, seen, info, taps)
        stack = self.inputs[module].stack(hidden).modules[module]
        return combine(stack, seen, indices_TK, weights_TK, self.combination)

    def seen(self, module: str, hidden: Tensor, *, exact: bool = True) -> Seen:
        """What the router sees of a (…, D) input of a module, exactly or as it is configured."""
        return self.inputs[module].seen(hidden, module, exact=exact)


def _check(projections: Projections) -> None:
    if isinstance(projections, torch.dtype):
        known = projections.is_floating_point and projections.itemsize > 1  # no products in float8
    else:
        known = projections in (None, "exact", "sieved")
    if not known:
        raise ConfigError(
            f"projections must be exact, sieved, None or a floating type of 16 bits or more: "
            f"{projections!r}"
        )


def _shared_inputs(
    shelf: Shelf, places: Sequence[Place], reading: Reading
) -> dict[str, SharedInput]:
    found: dict[str, SharedInput] = {}
    for members in groups({place.name: place.width for place in places}):
        found.update(dict.fromkeys(members, SharedInput(shelf, members, reading=reading)))
    return found


def _info(module: str, shelf: Shelf, router: Router) -> SiteInfo:
    spectra = [adapter.modules.get(module) for adapter in shelf]
    available = sum(spectrum is not None and spectrum.rank > 0 for spectrum in spectra)
    return SiteInfo(Site(module), len(shelf), router.rule.width(available), shelf.names)
