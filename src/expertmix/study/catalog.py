"""Which models work: tested families, those that do not fit and why, and one model in detail."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from expertmix.bindings.families import TESTED, UNSUPPORTED
from expertmix.core.progress import Progress, quiet


@dataclass(frozen=True, slots=True)
class Catalog:
    """Families of transformers.

    Attributes:
        tested: Model types for which the laws of recording are tested.
        refused: Class of an experts module and why it cannot be recorded.
    """

    tested: tuple[str, ...]
    refused: dict[str, str]

    def figures(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"tested": list(self.tested), "refused": self.refused}


def catalog() -> Catalog:
    """What is known of families."""
    return Catalog(TESTED, UNSUPPORTED)


def describe(model: str, progress: Progress = quiet) -> dict[str, Any]:
    """A model's sites, without reading its weights.

    Args:
        model: Hub id, folder, `default` or `default-moe`.
        progress: Told what is going on.

    Raises:
        NoSitesError: A dense model.
        ModelError: It cannot be opened.
    """
    from expertmix.study.figures import site_list
    from expertmix.study.loading import outline

    found = outline(model, progress)
    return {
        "model": model,
        "architecture": found.architecture,
        "context": found.context,
        "sites": site_list(found.sites),
    }
