"""See, compose, re-mix and explain how experts are routed inside language models.

This is the table of contents. Names are loaded when they are first used, so `import expertmix` is
fast and does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from expertmix.errors import ExpertmixError

if TYPE_CHECKING:
    from expertmix.bindings.record import record, sites
    from expertmix.core.decision import Decision
    from expertmix.core.intervention import InOrder, Intervention, Stage
    from expertmix.core.pathway import Question
    from expertmix.core.removal import Ablate, Mask
    from expertmix.core.replay import Replay
    from expertmix.core.reweight import Reweight
    from expertmix.core.serialize import from_json
    from expertmix.core.site import Site, SiteInfo
    from expertmix.core.trace import Trace
    from expertmix.experts.compose import compose
    from expertmix.experts.composed import Composed
    from expertmix.experts.shelf import Shelf
    from expertmix.optimize.reference import ReferenceSet
    from expertmix.optimize.samples import Sample
    from expertmix.study.remix import references, remix

__version__ = "0.1.0"

_CONTENTS = {
    "Ablate": "core.removal",
    "Composed": "experts.composed",
    "Decision": "core.decision",
    "InOrder": "core.intervention",
    "Intervention": "core.intervention",
    "Mask": "core.removal",
    "Question": "core.pathway",
    "ReferenceSet": "optimize.reference",
    "Replay": "core.replay",
    "Reweight": "core.reweight",
    "Sample": "optimize.samples",
    "Site": "core.site",
    "Shelf": "experts.shelf",
    "SiteInfo": "core.site",
    "Stage": "core.intervention",
    "Trace": "core.trace",
    "compose": "experts.compose",
    "from_json": "core.serialize",
    "record": "bindings.record",
    "references": "study.remix",
    "remix": "study.remix",
    "sites": "bindings.record",
}

__all__ = [
    "Ablate",
    "Composed",
    "Decision",
    "ExpertmixError",
    "InOrder",
    "Intervention",
    "Mask",
    "Question",
    "ReferenceSet",
    "Replay",
    "Reweight",
    "Sample",
    "Shelf",
    "Site",
    "SiteInfo",
    "Stage",
    "Trace",
    "compose",
    "from_json",
    "record",
    "references",
    "remix",
    "sites",
]


def __getattr__(name: str) -> Any:
    if name in _CONTENTS:
        return getattr(import_module(f"expertmix.{_CONTENTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
