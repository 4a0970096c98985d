"""A base and a library of adapters by name, looked at before any weights of the base are read.

`look` builds the base's structure only; `Composition.sites` then tells an adapter of another base,
a module that is missing, or a router that does not fit within a second.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from expertmix.core.progress import Progress, quiet
from expertmix.core.site import SiteInfo
from expertmix.experts.fused import Combination
from expertmix.experts.places import check_bases
from expertmix.experts.plan import Plan
from expertmix.experts.shelf import Shelf
from expertmix.models.default import ASSETS
from expertmix.routers.router import Router
from expertmix.study.loading import Skeleton, skeleton
from expertmix.study.names import DEFAULT


@dataclass(frozen=True, eq=False, slots=True)
class Composition:
    """A base without its weights, and a shelf that fits it.

    Attributes:
        base: The base's structure, context and tokenizer.
        shelf: The adapters.
    """

    base: Skeleton
    shelf: Shelf

    def sites(self, router: Router, combination: Combination = "outputs") -> tuple[SiteInfo, ...]:
        """The sites that a router would have.

        Raises:
            CheckpointError: An adapter does not fit the base.
            ConfigError: The router does not fit the shelf.
        """
        plan = Plan.lay(self.base.model, self.shelf, router, combination)
        return tuple(plan.infos.values())

    def figures(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "base": self.base.name,
            "architecture": self.base.architecture,
            "adapters": [
                {"name": one.name, "modules": len(one.modules), "rank": rank(one.modules.values())}
                for one in self.shelf
            ],
        }


def rank(spectra: Any) -> int:
    """The largest rank of an adapter's modules."""
    return max((spectrum.rank for spectrum in spectra), default=0)


def open_shelf(library: str, progress: Progress = quiet) -> Shelf:
    """Adapters by name: `default` for those that expertmix ships, else a folder or a hub id.

    Raises:
        CheckpointError: No adapter there, or one that is refused.
    """
    progress("reading the adapters", 0, 0)
    return Shelf.open(ASSETS / "experts" if library == DEFAULT else library)


def look(
    base: str, library: str, *, any_base: bool = False, progress: Progress = quiet
) -> Composition:
    """Base and adapters; whether their modules fit, `Composition.sites` tells.

    Args:
        base: Hub id, folder or `default`.
        library: A folder of adapters, a hub id or `default`.
        any_base: Allow adapters whose config names another base.
        progress: Told what is going on.

    Raises:
        CheckpointError: No such base or library, or an adapter that is refused or names another
            base.
    """
    shelf = open_shelf(library, progress)
    found = Composition(skeleton(base, progress), shelf)
    if not any_base:
        check_bases(found.base.model, shelf)
    return found
