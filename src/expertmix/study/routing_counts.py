"""Which adapter each text went to: counted while texts are read, without keeping any trace.

At every level (all sites together, a layer, a kind of module, one site) a token goes to the adapter
that has the largest weight, summed over the sites of that level. Adapters that tie share the token,
so that a router without preference is right as often as chance.

Legend: T tokens of a pass, B texts of a pass, N texts, G levels, S sites, E adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expertmix.attribute.modules import parts, winners
from expertmix.core.site import SiteInfo
from expertmix.core.trace import Chunk

ALL = "all sites"
_CELLS = 16_000_000  # levels × tokens × adapters that are looked at together: bounds memory


@dataclass(frozen=True, eq=False, slots=True)
class Levels:
    """Sets of sites over which weights are summed.

    Attributes:
        layers: Names of the layers, in order.
        kinds: Kinds of modules, in order.
        sites: Names of the sites.
        member: (G, S) one where a site belongs: all sites, then layers, kinds, single sites.
    """

    layers: tuple[str, ...]
    kinds: tuple[str, ...]
    sites: tuple[str, ...]
    member: Tensor

    @classmethod
    def of(cls, infos: Sequence[SiteInfo]) -> Levels:
        """The levels of some sites."""
        layers = parts(infos, lambda module: module.layer)
        kinds = parts(infos, lambda module: module.kind)
        place = {info.site: number for number, info in enumerate(infos)}
        sets = [list(infos), *layers.values(), *kinds.values(), *([info] for info in infos)]
        member_GS = torch.zeros(len(sets), len(infos))
        for row, members in enumerate(sets):
            member_GS[row, [place[info.site] for info in members]] = 1
        names = tuple(str(info.site) for info in infos)
        return cls(tuple(layers), tuple(kinds), names, member_GS)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the G levels."""
        return (ALL, *self.layers, *self.kinds, *self.sites)


@dataclass(frozen=True, eq=False, slots=True)
class RoutingCounts:
    """Where the tokens of each text went.

    Attributes:
        experts: Names of the E adapters.
        levels: The G levels.
        own: (N,) number of the adapter that a text's label names, -1 where it names none.
        tokens: (N,) tokens of each text.
        chosen: (N, E) tokens that went to each adapter; those that tie share a token.
        right: (N, G) tokens that went to the text's own adapter, at each level.
        mass: (N, E) weight of each adapter, summed over tokens and sites.
    """

    experts: tuple[str, ...]
    levels: Levels
    own: Tensor
    tokens: Tensor
    chosen: Tensor
    right: Tensor
    mass: Tensor

    @property
    def chance(self) -> float:
        """How often a router without preference is right: 1 / E."""
        return 1 / len(self.experts)

    @property
    def right_texts(self) -> Tensor:
        """(N,) one where a text as a whole gave most weight to its own adapter."""
        known_N = self.own >= 0
        return winners(self.mass).gather(1, self.own.clamp(min=0)[:, None]).squeeze(1) * known_N


class RoutingCounter:
    """Counts passes as they come.

    Args:
        infos: The sites; all with the same adapters.
        labels: Of the N texts.
    """

    def __init__(self, infos: Sequence[SiteInfo], labels: Sequence[str | None]) -> None:
        self._infos = tuple(infos)
        names, texts = infos[0].experts, len(labels)
        levels = Levels.of(infos)
        own = [names.index(label) if label in names else -1 for label in labels]
        self._counts = RoutingCounts(
            experts=names,
            levels=levels,
            own=torch.tensor(own, dtype=torch.int64),
            tokens=torch.zeros(texts, dtype=torch.float64),
            chosen=torch.zeros(texts, len(names), dtype=torch.float64),
            right=torch.zeros(texts, len(levels.names), dtype=torch.float64),
            mass=torch.zeros(texts, len(names), dtype=torch.float64),
        )

    def add(self, chunk: Chunk, numbers: Sequence[int]) -> None:
        """Count one pass.

        Args:
            chunk: What was recorded of it.
            numbers: Number of the text in each of its rows.
        """
        texts = torch.tensor(list(numbers))
        row_T = chunk.tokens.sample - chunk.tokens.sample.min()
        real_T = chunk.tokens.real.nonzero().flatten()
        cells = len(self._counts.levels.names) * len(self._counts.experts)
        size = max(1, _CELLS // cells)
        for start in range(0, len(real_T), size):
            part_T = real_T[start : start + size]
            self._add(self._weights(chunk, part_T), texts[row_T[part_T]])

    def _add(self, weights_STE: Tensor, text_T: Tensor) -> None:
        counts = self._counts
        sums_GTE = torch.einsum("gs,ste->gte", counts.levels.member, weights_STE)
        winner_GTE = winners(sums_GTE)
        own_T = counts.own[text_T]
        place_GT1 = own_T.clamp(min=0)[None, :, None].expand(len(sums_GTE), -1, 1)
        right_GT = winner_GTE.gather(2, place_GT1).squeeze(2) * (own_T >= 0)
        counts.tokens.index_add_(0, text_T, torch.ones(len(text_T), dtype=torch.float64))
        counts.chosen.index_add_(0, text_T, winner_GTE[0].double())
        counts.right.index_add_(0, text_T, right_GT.T.double())
        counts.mass.index_add_(0, text_T, sums_GTE[0].double())

    def _weights(self, chunk: Chunk, rows_T: Tensor) -> Tensor:
        """(S, T, E) weights of some tokens; zero where a site did not run."""
        nothing_TE = torch.zeros(len(rows_T), len(self._counts.experts))
        found = [chunk.decisions.get(info.site) for info in self._infos]
        return torch.stack(
            [nothing_TE if one is None else one.rows(rows_T).dense().float() for one in found]
        )

    def result(self) -> RoutingCounts:
        """What was counted so far."""
        return self._counts
