"""What is changed: frozen, serializable edits of routing decisions.

A router works in stages, and every intervention acts at stages that it names:

    gate -> LOGITS -> score function -> PROBABILITIES -> SELECTION (top-k) -> WEIGHTS -> experts

The stages run in this order. Interventions that act at the same stage apply in the order in which
they are given. This file knows nothing of models: it edits tensors that a binding hands to it.

Legend: T tokens of one pass, E experts, K selected experts, n addressed samples or experts.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from expertmix.core.decision import Decision
from expertmix.core.site import Site, SiteInfo, match
from expertmix.core.tokens import Pass
from expertmix.errors import (
    ConfigError,
    InterventionError,
    StageError,
    UnknownExpertError,
)


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
            end of the prompt: -1 is the last prompt token.
        samples: Rows of the batch.
        mask: mask[row][position], True where the token is edited; tokens beyond it are not.
    """

    kind: ClassVar[str]

    positions: tuple[int, ...] | None = None
    samples: tuple[int, ...] | None = None
    mask: tuple[tuple[bool, ...], ...] | None = None

    def __post_init__(self) -> None:
        _freeze(self, "positions", _integers(self.positions))
        _freeze(self, "samples", _integers(self.samples))
        if self.mask is not None:
            rows = self.mask.tolist() if isinstance(self.mask, Tensor) else self.mask
            _freeze(self, "mask", tuple(tuple(bool(cell) for cell in row) for row in rows))

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

    def _address_dict(self) -> dict[str, Any]:
        fields = {"positions": self.positions, "samples": self.samples, "mask": self.mask}
        return {name: _listed(value) for name, value in fields.items() if value is not None}


@dataclass(frozen=True)
class Ablate(Intervention):
    """Drop experts after selection: their weight is zero and nobody steps in.

    The expert's output is lost and the other weights stay as they are. Compare `Mask`.

    Attributes:
        sites: Pattern of site names, such as `*.layers.7.mlp`.
        experts: Numbers of the experts.
    """

    kind: ClassVar[str] = "ablate"

    sites: str
    experts: tuple[int, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        _freeze(self, "experts", _integers(self.experts))

    @property
    def stages(self) -> frozenset[Stage]:
        """After top-k."""
        return frozenset({Stage.WEIGHTS})

    def targets(self, sites: Sequence[SiteInfo]) -> frozenset[Site]:
        """All matching sites; each must have the experts."""
        return _with_experts(self.sites, self.experts, sites)

    def edit_decision(self, decision: Decision, site: SiteInfo, at: Pass) -> Decision:
        """Set the weight of the experts to zero."""
        dropped_TK = torch.isin(decision.indices, _vector(self.experts, decision.indices))
        dropped_TK &= self.addressed(at)[:, None]
        weights = decision.weights.masked_fill(dropped_TK, 0)
        return Decision(decision.indices, weights, decision.num_experts, decision.logits)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "kind": self.kind, "sites": self.sites, "experts": list(self.experts),
            **self._address_dict(),
        }  # fmt: skip


@dataclass(frozen=True)
class Mask(Intervention):
    """Forbid experts before selection: the router's own rule chooses again among the others.

    Attributes:
        sites: Pattern of site names.
        experts: Numbers of the experts that may not be chosen.
    """

    kind: ClassVar[str] = "mask"

    sites: str
    experts: tuple[int, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        _freeze(self, "experts", _integers(self.experts))

    @property
    def stages(self) -> frozenset[Stage]:
        """On the logits (so that no mass is kept) and again where top-k reads its scores."""
        return frozenset({Stage.LOGITS, Stage.SELECTION})

    def targets(self, sites: Sequence[SiteInfo]) -> frozenset[Site]:
        """All matching sites; each must keep at least K experts."""
        found = _with_experts(self.sites, self.experts, sites)
        for info in sites:
            left = info.num_experts - len(set(self.experts))
            if info.site in found and left < info.top_k:
                raise InterventionError(
                    f"Mask leaves {left} experts at {info.site}, but its router must choose "
                    f"{info.top_k}. Mask fewer experts, or use Ablate."
                )
        return found

    def edit_scores(self, stage: Stage, scores_TE: Tensor, site: SiteInfo, at: Pass) -> Tensor:
        """Set the scores of the experts to minus infinity."""
        return scores_TE.masked_fill(self.banned(site, at), float("-inf"))

    def banned(self, site: SiteInfo, at: Pass) -> Tensor:
        """(T, E) bool: what may not be chosen."""
        experts_E = torch.zeros(site.num_experts, dtype=torch.bool, device=at.row.device)
        experts_E[list(self.experts)] = True
        return self.addressed(at)[:, None] & experts_E

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "kind": self.kind, "sites": self.sites, "experts": list(self.experts),
            **self._address_dict(),
        }  # fmt: skip


Mode = Literal["set", "add", "scale"]


@dataclass(frozen=True, eq=False)
class Reweight(Intervention):
    """Give weights, at a stage that is named.

    At `logits` and `probabilities` the values replace, shift or scale the router's own and its rule
    then selects. At `weights`, after top-k: `set` makes the values the decision itself (experts
    with value zero are not called, and more than K may be), `add` and `scale` change the weights of
    the experts that were selected and nobody steps in. Values may require gradients.

    Attributes:
        sites: Pattern of site names.
        values: (n,) for every addressed token, or (len(samples), n) with one row per sample; n is
            E, or len(experts) where those are given.
        stage: `logits`, `probabilities` or `weights`.
        mode: `set`, `add` or `scale`.
        experts: The experts that the values are for; all others keep what they have.
    """

    kind: ClassVar[str] = "reweight"

    sites: str
    values: Tensor
    stage: Literal["logits", "probabilities", "weights"]
    mode: Mode = "set"
    experts: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _freeze(self, "experts", _integers(self.experts))
        _freeze(self, "values", torch.as_tensor(self.values))
        if self.stage not in ("logits", "probabilities", "weights"):
            raise StageError(
                f"Reweight has no stage {self.stage!r}: logits, probabilities, weights"
            )
        if self.mode not in ("set", "add", "scale"):
            raise InterventionError(f"Reweight has no mode {self.mode!r}: set, add, scale")
        if self.values.dim() == 2 and self.samples is None:
            raise InterventionError("Reweight with a row of values per sample needs samples=(…)")
        if self.values.dim() == 2 and len(self.values) != len(self.samples or ()):
            raise InterventionError(
                f"Reweight has {len(self.values)} rows of values "
                f"for {len(self.samples or ())} samples"
            )
        if self.values.dim() not in (1, 2):
            raise InterventionError(
                f"Reweight values must be (n,) or (samples, n), not {self.values.shape}"
            )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Reweight) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash((self.sites, self.stage, self.mode, self.experts, self.samples))

    @property
    def stages(self) -> frozenset[Stage]:
        """The named one."""
        return frozenset({Stage(self.stage)})

    def targets(self, sites: Sequence[SiteInfo]) -> frozenset[Site]:
        """All matching sites; the values must fit each of them."""
        found = _with_experts(self.sites, self.experts or (), sites)
        for info in sites:
            width = info.num_experts if self.experts is None else len(self.experts)
            if info.site in found and self.values.shape[-1] != width:
                raise InterventionError(
                    f"Reweight has {self.values.shape[-1]} values where {info.site} takes {width}"
                )
        return found

    def edit_scores(self, stage: Stage, scores_TE: Tensor, site: SiteInfo, at: Pass) -> Tensor:
        """Replace, shift or scale (T, E) scores."""
        return self._mix(scores_TE, site, at)

    def edit_decision(self, decision: Decision, site: SiteInfo, at: Pass) -> Decision:
        """Change the weights after top-k; `set` decides anew."""
        if self.mode == "set":
            return self._assign(decision, site, at)
        slots_TK = decision.indices.clamp(min=0)
        neutral = 1.0 if self.mode == "scale" else 0.0
        values_TE = self._mix(
            decision.weights.new_full((len(at), site.num_experts), neutral), site, at
        )
        values_TK = values_TE.gather(1, slots_TK)
        weights = decision.weights * values_TK if neutral else decision.weights + values_TK
        return Decision(decision.indices, weights, decision.num_experts, decision.logits)

    def _assign(self, decision: Decision, site: SiteInfo, at: Pass) -> Decision:
        dense_TE = self._mix(decision.dense(), site, at)
        called_TE = dense_TE != 0
        width = max(decision.top_k, int(called_TE.sum(1).max()) if len(at) else 0)
        indices_TK = called_TE.to(torch.float32).topk(width, dim=1).indices
        weights_TK = dense_TE.gather(1, indices_TK)
        if width == decision.top_k:  # untouched tokens keep their slots, bit for bit
            mine = self.addressed(at)[:, None]
            indices_TK = torch.where(mine, indices_TK, decision.indices)
            weights_TK = torch.where(mine, weights_TK, decision.weights)
        return Decision(indices_TK, weights_TK, decision.num_experts, decision.logits)

    def _mix(self, scores_TE: Tensor, site: SiteInfo, at: Pass) -> Tensor:
        values = self.values.to(scores_TE)
        if values.dim() == 2:
            rows = _vector(self.samples or (), at.row)
            values = values[(at.row[:, None] == rows).to(torch.int8).argmax(1)]
        columns = _vector(range(site.num_experts) if self.experts is None else self.experts, at.row)
        old = scores_TE[:, columns]
        new = {"set": values.expand_as(old), "add": old + values, "scale": old * values}[self.mode]
        new = torch.where(self.addressed(at)[:, None], new, old)
        return scores_TE.index_copy(1, columns, new)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; gradients are not kept."""
        values = self.values.detach().to(torch.float64).tolist()
        optional = {} if self.experts is None else {"experts": list(self.experts)}
        return {
            "kind": self.kind, "sites": self.sites, "values": values, "stage": self.stage,
            "mode": self.mode, **optional, **self._address_dict(),
        }  # fmt: skip


@dataclass(frozen=True, init=False)
class InOrder(Intervention):
    """Several interventions as one: what `remix` returns for a whole model, for example."""

    kind: ClassVar[str] = "in_order"

    interventions: tuple[Intervention, ...]

    def __init__(self, *interventions: Intervention) -> None:
        super().__init__()
        _freeze(self, "interventions", interventions)

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


def _with_experts(
    pattern: str, experts: Iterable[int], sites: Sequence[SiteInfo]
) -> frozenset[Site]:
    found = frozenset(match(pattern, [info.site for info in sites]))
    for info in sites:
        wrong = [expert for expert in experts if not 0 <= expert < info.num_experts]
        if info.site in found and wrong:
            raise UnknownExpertError(
                f"{info.site} has experts 0 to {info.num_experts - 1}, not {wrong[0]}"
            )
    return found


def _integers(values: Any) -> tuple[int, ...] | None:
    if values is None:
        return None
    if isinstance(values, int):
        return (values,)
    listed = values.tolist() if isinstance(values, Tensor) else list(values)
    if not all(isinstance(value, int) and not isinstance(value, bool) for value in listed):
        raise ConfigError(f"expected whole numbers, got {listed!r}")
    return tuple(listed)


def _vector(values: Iterable[int], like: Tensor) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int64, device=like.device)


def _listed(value: Any) -> Any:
    return [_listed(item) for item in value] if isinstance(value, tuple) else value


def _freeze(instance: object, name: str, value: object) -> None:
    object.__setattr__(instance, name, value)
