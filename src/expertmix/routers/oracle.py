"""The adapter that was trained on the text's own task: the upper bound, where that is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expertmix.errors import ConfigError
from expertmix.routers.router import Router, known
from expertmix.routers.rule import Rule
from expertmix.routers.seen import Seen


@dataclass(frozen=True)
class Oracle(Router):
    """Told the answer: one adapter per row of the batch.

    Attributes:
        adapters: A name for each row. Where that adapter does nothing, the weight is zero.

    Raises:
        ConfigError: No name, or (when it runs) another number of rows.
    """

    adapters: tuple[str, ...]

    def __post_init__(self) -> None:
        if isinstance(self.adapters, str) or not self.adapters:
            raise ConfigError("Oracle needs one adapter's name for each row of the batch")
        object.__setattr__(self, "adapters", tuple(self.adapters))

    @property
    def rule(self) -> Rule:
        """One, with weight one."""
        return Rule(1, "given")

    def check(self, names: Sequence[str], modules: Sequence[str]) -> None:
        """Every name must be on the shelf."""
        for name in self.adapters:
            known(name, names)

    def scores(self, seen: Seen) -> Tensor:
        """(T, E) zero for the row's adapter, minus infinity for all others."""
        names = seen.directions.names
        if seen.rows != len(self.adapters):
            raise ConfigError(
                f"the oracle knows the adapters of {len(self.adapters)} rows, "
                f"the batch has {seen.rows}"
            )
        own_B = torch.tensor([known(name, names) for name in self.adapters])
        own_T = own_B.repeat_interleave(len(seen.hidden) // seen.rows).to(seen.hidden.device)
        scores_TE = torch.full((len(own_T), len(names)), float("-inf"), device=own_T.device)
        return scores_TE.scatter(1, own_T[:, None], 0.0)
