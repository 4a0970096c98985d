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
from expertmix.experts.choice import choose
from expertmix.experts.fused import Combination, combine
from expertmix.experts.places import Place, find_places
from expertmix.experts.shared_input import SharedInput, groups
from expertmix.experts.shelf import Shelf
from expertmix.routers.directions import Seen
from expertmix.routers.router import Router


@dataclass(frozen=True, eq=False)
class Plan:
    """A shelf and a router, laid out for one model.

    Attributes:
        shelf: The adapters.
        router: Who decides.
        combination: How outputs combine.
        projections: The type in which inputs are projected; None for their own.
        places: Modules at which something is added, in the model's order.
        infos: A site per place.
        inputs: Per place the product that it shares with others.
    """

    shelf: Shelf
    router: Router
    combination: Combination
    projections: torch.dtype | None
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
        projections: torch.dtype | None = None,
    ) -> Plan:
        """Check that all of it fits, and lay it out.

        Raises:
            CheckpointError: An adapter does not fit the model.
            ConfigError: The router does not fit the shelf, or an unknown combination.
        """
        if combination not in ("outputs", "aligned"):
            raise ConfigError(f"combination must be outputs or aligned: {combination!r}")
        if projections is not None and not projections.is_floating_point:
            raise ConfigError(f"projections must be a floating type: {projections}")
        places = find_places(model, shelf)
        names = [place.name for place in places]
        router.check(shelf.names, names)
        infos = {name: _info(name, shelf, router) for name in names}
        inputs = _shared_inputs(shelf, names, projections)
        return cls(shelf, router, combination, projections, places, infos, inputs)

    def added(self, module: str, hidden: Tensor, taps: Sequence[Tap]) -> Tensor | None:
        """(T, out) what the selected add at a module for a (…, D) input; None elsewhere."""
        if module not in self.infos:
            return None
        seen = self.seen(module, hidden)
        indices_TK, weights_TK = choose(self.router, seen, self.infos[module], taps)
        stack = self.inputs[module].stack(hidden).modules[module]
        return combine(stack, seen.projected, indices_TK, weights_TK, self.combination)

    def seen(self, module: str, hidden: Tensor) -> Seen:
        """What the router sees of a (…, D) input of a module."""
        shared = self.inputs[module]
        projected_TR = shared.project(hidden, module)
        directions = shared.stack(hidden).modules[module].directions
        rows = hidden.shape[0] if hidden.dim() > 2 else 1
        return Seen(hidden.reshape(-1, hidden.shape[-1]), projected_TR, directions, module, rows)


def _shared_inputs(
    shelf: Shelf, names: list[str], projections: torch.dtype | None
) -> dict[str, SharedInput]:
    found: dict[str, SharedInput] = {}
    for members in groups(names):
        found.update(dict.fromkeys(members, SharedInput(shelf, members, dtype=projections)))
    return found


def _info(module: str, shelf: Shelf, router: Router) -> SiteInfo:
    spectra = [adapter.modules.get(module) for adapter in shelf]
    available = sum(spectrum is not None and spectrum.rank > 0 for spectrum in spectra)
    return SiteInfo(Site(module), len(shelf), router.rule.width(available), shelf.names)
