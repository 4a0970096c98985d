"""What is changed: frozen, serializable edits of routing decisions.

A router works in stages, and every intervention acts at stages that it names:

    gate -> LOGITS -> score function -> PROBABILITIES -> SELECTION (top-k) -> WEIGHTS -> experts

The stages run in this order. Interventions that act at the same stage apply in the order in which
they are given. This file has what all of them share; the edits themselves are in `removal`,
`reweight` and `replay`. None knows a model: they edit tensors that a binding hands to them.

Legend: T tokens of one pass, E experts, n addressed positions.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

import torch
from torch import Tensor

from expertmix.core.decision import Decision
from expertmix.core.fields import freeze, listed, optional_integers, optional_table
from expertmix.core.site import Site, SiteInfo, match
from expertmix.core.tokens import Pass
from expertmix.errors import ConfigError, UnknownExpertError


class Stage(StrEnum):
    """A point inside a router where values can be edited."""

    LOGITS = "logits"
    PROBABILITIES = "probabilities"
    SELECTION = "selection"
    WEIGHTS = "weights"


@dataclass(frozen=True, kw_only=True)
class Intervention(ABC):
    """An edit of the decisions at the sites that a pattern matches.

    All address fields may be combined; a token is edited when every one that is given names it.
    Padding is never edited.

    Attributes:
        positions: Places in the sequence, padding not counted. Negative ones count back from the
            end of the prompt: -1 is the last prompt token. The prompt is what the first pass of a
            sample reads: where it is prefilled in chunks, count from the start instead.
        samples: Rows of the batch, from 0.
        mask: mask[row][position], True where the token is edited; tokens beyond it are not.
    """

    kind: ClassVar[str]

    positions: tuple[int, ...] | None = None
    samples: tuple[int, ...] | None = None
    mask: tuple[tuple[bool, ...], ...] | None = None

    def __post_init__(self) -> None:
        freeze(self, "positions", optional_integers(self.positions))
        freeze(self, "samples", optional_integers(self.samples))
        freeze(self, "mask", optional_table(self.mask))
        if min(self.samples or (0,)) < 0:
            raise ConfigError(f"samples are rows of the batch, from 0: {list(self.samples or ())}")

    @property
    @abstractmethod
    def stages(self) -> frozenset[Stage]:
        """Where it acts."""

    @abstractmethod
    def targets(self, sites: Sequence[SiteInfo]) -> frozenset[Site]:
        """The sites it acts on, checked before anything runs.

        Raises:
            AddressError: A site or an expert does not exist.
            InterventionError: The edit is not possible there.
        """

    def edit_scores(self, stage: Stage, scores_TE: Tensor, site: SiteInfo, at: Pass) -> Tensor:
        """Edit (T, E) logits, probabilities or selection scores."""
        return scores_TE

    def edit_decision(self, decision: Decision, site: SiteInfo, at: Pass) -> Decision:
        """Edit what was selected, after top-k."""
        return decision

    def parts(self) -> tuple[Intervention, ...]:
        """The single edits it is made of."""
        return (self,)

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description; `from_dict` reads it back."""

    def to_json(self) -> str:
        """The intervention as JSON."""
        return json.dumps(self.to_dict())

    def addressed(self, at: Pass) -> Tensor:
        """(T,) bool: the tokens that are edited."""
        chosen_T = at.tokens.real
        if self.positions is not None:
            wanted = torch.tensor(self.positions, device=chosen_T.device)
            place_Tn = torch.where(wanted < 0, at.prompt_length[:, None] + wanted, wanted)
            chosen_T = chosen_T & (at.tokens.position[:, None] == place_Tn).any(1)
        if self.samples is not None:
            rows = torch.tensor(self.samples, device=chosen_T.device)
            chosen_T = chosen_T & torch.isin(at.row, rows)
        if self.mask is not None:
            chosen_T = chosen_T & self._masked(at)
        return chosen_T

    def _masked(self, at: Pass) -> Tensor:
        mask = self.mask or ()
        width = max((len(row) for row in mask), default=0)
        table = torch.zeros(len(mask) + 1, width + 1, dtype=torch.bool)
        for number, row in enumerate(mask):
            table[number, : len(row)] = torch.tensor(row)
        row_T = at.row.clamp(max=len(mask))
        place_T = at.tokens.position.clamp(min=0, max=width)
        return table.to(row_T.device)[row_T, place_T]

    def address(self) -> dict[str, Any]:
        """The address fields that are set, JSON-ready."""
        fields = {"positions": self.positions, "samples": self.samples, "mask": self.mask}
        return {name: listed(value) for name, value in fields.items() if value is not None}


@dataclass(frozen=True, init=False)
class InOrder(Intervention):
    """Several interventions as one: what `remix` returns for a whole model, for example."""

    kind: ClassVar[str] = "in_order"

    interventions: tuple[Intervention, ...]

    def __init__(self, *interventions: Intervention) -> None:
        super().__init__()
        freeze(self, "interventions", interventions)

    @property
    def stages(self) -> frozenset[Stage]:
        """All stages of its parts."""
        return frozenset(stage for part in self.interventions for stage in part.stages)

    def targets(self, sites: Sequence[SiteInfo]) -> frozenset[Site]:
        """All sites of its parts."""
        return frozenset(site for part in self.interventions for site in part.targets(sites))

    def parts(self) -> tuple[Intervention, ...]:
        """The parts, flattened."""
        return tuple(part for outer in self.interventions for part in outer.parts())

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"kind": self.kind, "interventions": [part.to_dict() for part in self.interventions]}


def matching(pattern: str, experts: Iterable[int], sites: Sequence[SiteInfo]) -> frozenset[Site]:
    """The sites that a pattern names, each of which must have the experts.

    Raises:
        UnknownSiteError: No site matches.
        UnknownExpertError: A site has no expert of that number.
    """
    found = frozenset(match(pattern, [info.site for info in sites]))
    for info in sites:
        wrong = [expert for expert in experts if not 0 <= expert < info.num_experts]
        if info.site in found and wrong:
            raise UnknownExpertError(
                f"{info.site} has experts 0 to {info.num_experts - 1}, not {wrong[0]}"
            )
    return found
