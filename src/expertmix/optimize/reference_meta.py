"""What a reference set says of itself, and its samples as JSON.

Knows the format; not where it is stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from expertmix.core.pathway import Pathways, Question
from expertmix.core.site import Site, SiteInfo
from expertmix.errors import ConfigError, FingerprintError
from expertmix.optimize.samples import Sample

VERSION = 1
_KIND = "expertmix reference set"


@dataclass(frozen=True, slots=True)
class ReferenceMeta:
    """Which model made a reference set, and how.

    Attributes:
        fingerprint: Of the model.
        sites: The L critical sites.
        decisions: D.
        exact: Whether the states are for exact suffix evaluation.
        embedding: `last`, `mean`, `sentence-transformers:NAME` or `given`.
        states: Whether states were kept.
        tried: Samples that were read.
        succeeded: References: those that the model got right.
        version: Of the format.
    """

    fingerprint: str
    sites: tuple[SiteInfo, ...]
    decisions: int
    exact: bool
    embedding: str
    states: bool
    tried: int = 0
    succeeded: int = 0
    version: int = VERSION

    @property
    def accuracy(self) -> float:
        """Share of the samples that the model got right."""
        return self.succeeded / self.tried if self.tried else 0.0

    def check(self, pathways: Pathways) -> None:
        """Whether the set was made with this model and these critical sites.

        Raises:
            FingerprintError: Another model.
            ConfigError: Other sites or decision tokens.
        """
        if self.fingerprint != pathways.fingerprint():
            raise FingerprintError(
                "the reference set was made with another model (or with other weights): its "
                "pathways mean nothing here. Build it again with this model"
            )
        mine, other = (", ".join(map(_place, sites)) for sites in (self.sites, pathways.sites))
        if mine != other:
            raise ConfigError(
                f"the reference set is of other critical sites ({mine}) than asked for ({other}): "
                f"choose the same layers, or build it again"
            )
        if self.decisions != pathways.decisions:
            raise ConfigError(
                f"the reference set has {self.decisions} decision tokens, {pathways.decisions} are "
                f"asked for: choose as many, or build it again"
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        sites = [
            [str(info.site), info.num_experts, info.top_k, list(info.experts)]
            for info in self.sites
        ]
        return {
            "kind": _KIND, "version": self.version, "fingerprint": self.fingerprint,
            "sites": sites, "decisions": self.decisions, "exact": self.exact,
            "embedding": self.embedding, "states": self.states, "tried": self.tried,
            "succeeded": self.succeeded,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, data: Any, where: str) -> ReferenceMeta:
        """Read what `to_dict` made.

        Raises:
            ConfigError: Something else, or of another version.
        """
        if not isinstance(data, Mapping) or data.get("kind") != _KIND:
            raise ConfigError(f"{where} is no reference set")
        if data.get("version") != VERSION:
            raise ConfigError(
                f"{where} has format {data.get('version')}, this expertmix reads {VERSION}: build "
                f"it again"
            )
        fields = {key: value for key, value in data.items() if key != "kind"}
        try:
            sites = tuple(
                SiteInfo(Site.parse(name), experts, top_k, tuple(names))
                for name, experts, top_k, names in fields.pop("sites")
            )
            return cls(sites=sites, **fields)
        except (KeyError, TypeError, ValueError) as problem:
            raise ConfigError(f"{where}: {problem}. Build it again") from problem


def sample_to_dict(sample: Sample) -> dict[str, Any]:
    """JSON-ready."""
    return {
        "prompt": list(sample.question.prompt),
        "options": [list(option) for option in sample.question.options],
        "gold": sample.gold, "units": list(sample.units), "name": sample.name, "text": sample.text,
        "item": sample.item,
    }  # fmt: skip


def sample_from_dict(data: Mapping[str, Any]) -> Sample:
    """Read what `sample_to_dict` made."""
    question = Question(tuple(data["prompt"]), tuple(tuple(option) for option in data["options"]))
    units = tuple(data["units"])
    return Sample(question, data["gold"], units, data["name"], data["text"], data["item"])


def _place(info: SiteInfo) -> str:
    return f"{info.site} {info.top_k} of {info.num_experts}"
