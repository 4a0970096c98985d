"""Ridge regression of a module's input on "whose text is this": data-light, in closed form.

A few hundred tokens of each adapter's text are enough; no gradient, no labels but the adapter's
name. One linear map per module. This file is given hidden states and knows no model.

Legend: N tokens to fit on, T tokens of a pass, D width of the input, E adapters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from expertmix.errors import ConfigError
from expertmix.routers.router import Router
from expertmix.routers.rule import Rule, scored
from expertmix.routers.seen import Seen


@dataclass(frozen=True, eq=False)
class LinearMap:
    """Scores as a linear function of a module's input.

    Attributes:
        weight: (E, D).
        bias: (E,).
    """

    weight: Tensor
    bias: Tensor

    def __call__(self, hidden: Tensor) -> Tensor:
        """(T, E) from (T, D), in float32 or better."""
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        weight, bias = (value.to(hidden.device, dtype) for value in (self.weight, self.bias))
        return functional.linear(hidden.to(dtype), weight, bias)


@dataclass(frozen=True, eq=False)
class Ridge(Router):
    """Linear scores, fitted beforehand.

    Attributes:
        maps: A map per module.
        top_k: Adapters per token; None for all.
        temperature: Of the softmax; regression scores lie about between 0 and 1, so it is small.
        weights: `softmax` or `uniform`.

    Raises:
        ConfigError: A value that is not possible; a module that was not fitted (see `check`).
    """

    maps: Mapping[str, LinearMap] = field(repr=False)
    top_k: int | None = 2
    temperature: float = 0.1
    weights: Literal["uniform", "softmax"] = "softmax"

    def __post_init__(self) -> None:
        object.__setattr__(self, "maps", dict(self.maps))
        _ = self.rule

    @property
    def rule(self) -> Rule:
        """Top-k of the regression's scores."""
        return scored(self.top_k, self.weights, self.temperature)

    def check(self, names: Sequence[str], modules: Sequence[str]) -> None:
        """Every module must have a map, of one row per adapter."""
        for module in modules:
            if module not in self.maps:
                raise ConfigError(f"Ridge was not fitted for module {module!r}; fit it again")
            if len(self.maps[module].bias) != len(names):
                raise ConfigError(
                    f"Ridge was fitted for {len(self.maps[module].bias)} adapters at {module!r}, "
                    f"the shelf has {len(names)}; fit it again"
                )

    def scores(self, seen: Seen) -> Tensor:
        """(T, E) the regression's guess at "this is the adapter's text"."""
        if seen.module not in self.maps:
            raise ConfigError(f"Ridge was not fitted for module {seen.module!r}; fit it again")
        return self.maps[seen.module](seen.hidden)


class Moments:
    """Sums over tokens from which a map is solved: text after text, in memory of D².

    Every adapter counts the same, however many tokens it has.

    Args:
        width: D.
        counts: How many tokens each adapter will have in all.

    Raises:
        ConfigError: An adapter has no token.
    """

    def __init__(self, width: int, counts: Sequence[int]) -> None:
        if 0 in counts:
            raise ConfigError(f"no text was given for adapter {list(counts).index(0)}")
        self._shares = [1 / (len(counts) * count) for count in counts]
        self._gram = torch.zeros(width + 1, width + 1, dtype=torch.float64)
        self._targets = torch.zeros(len(counts), width + 1, dtype=torch.float64)

    def add(self, hidden: Tensor, expert: int) -> None:
        """Add (N, D) hidden states of a text of one adapter."""
        padded = functional.pad(hidden.detach().double().cpu(), (0, 1), value=1.0)
        self._gram += self._shares[expert] * (padded.T @ padded)
        self._targets[expert] += self._shares[expert] * padded.sum(0)

    def solve(self, penalty: float = 1e-2) -> LinearMap:
        """The map that minimizes Σ w ‖W x + b − onehot‖² + penalty · mean(x²) · ‖W‖².

        The weights w of an adapter's tokens add up to 1 / E.

        Args:
            penalty: Relative to the mean square of the input.

        Raises:
            ConfigError: The penalty is not above zero.
        """
        if not penalty > 0:
            raise ConfigError(f"penalty must be above zero: {penalty!r}")
        width = len(self._gram) - 1
        damped = self._gram.clone()
        # the bias, which comes last, is not penalized
        damped.diagonal()[:width] += penalty * self._gram.diagonal()[:width].mean()
        solved = torch.linalg.solve(damped, self._targets.T).T.float()
        return LinearMap(solved[:, :width].contiguous(), solved[:, width].contiguous())
