"""Pooled: one module's scores are noisy, so evidence is gathered over modules and tokens.

A single module sees little of what a text is about; the mean of calibrated scores over the modules
that a token has passed, and over the tokens before it, sees nearly all of it (docs/papers/spectr.md
has the figures). Ours; no paper.

Legend: T tokens, E adapters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor

from expertmix.core.site import Site
from expertmix.errors import ConfigError, UnsupportedRuntimeError
from expertmix.routers.calibrated import Calibrated, Level
from expertmix.routers.lag import Lag
from expertmix.routers.memory import Memory, Past
from expertmix.routers.router import Router
from expertmix.routers.rule import Rule, is_number, scored
from expertmix.routers.seen import Seen
from expertmix.routers.spectr import SpectR


@dataclass(frozen=True)
class Pooled(Router):
    """Another router's scores, pooled over the modules and tokens up to each decision.

    score(token t, module l) = Σ_{u ≤ t} 2^(-(t - u) / half_life) z(u, l) / (Σ … + prior), where
    z(u, l) is the mean of u's inner scores over the modules up to l, less their mean over adapters.

    Attributes:
        inner: Whose scores are evidence. They must be comparable between adapters: `compose` and
            `calibrate` see to that.
        half_life: In tokens, so that a text may change its subject; None never forgets.
        prior: So many tokens without evidence are counted in, so that the first tokens are careful.
        evidence: Pattern of the modules that give evidence; the first one in a pass always does.
            All others then project on the selected adapters only.
        top_k: Adapters per token; None for all.
        temperature: Of the softmax, in deviations.
        weights: `softmax` or `uniform`.

    Raises:
        ConfigError: A value that is not possible.
    """

    inner: Router = field(default_factory=lambda: SpectR(normalize=("input",)))
    half_life: float | None = 16.0
    prior: float = 4.0
    evidence: str = "*"
    top_k: int | None = 3
    temperature: float = 0.1
    weights: Literal["uniform", "softmax"] = "softmax"

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Router) or self.inner.remembers:
            raise ConfigError(f"inner must be a router without memory: {self.inner!r}")
        if self.inner.rule.weights == "given" or isinstance(measured(self.inner), Lag):
            raise ConfigError(f"inner must score every adapter, to be pooled: {self.inner!r}")
        if not isinstance(self.evidence, str):
            raise ConfigError(f"evidence must be a pattern of module names: {self.evidence!r}")
        life = 1.0 if self.half_life is None else self.half_life
        if not (is_number(life) and 0 < life < math.inf):
            raise ConfigError(f"half_life must be above 0 and finite, or None: {self.half_life!r}")
        if not (is_number(self.prior) and 0 <= self.prior < math.inf):
            raise ConfigError(f"prior must be 0 or more, and finite: {self.prior!r}")
        _ = self.rule

    @property
    def rule(self) -> Rule:
        """Top-k of the pooled scores."""
        return scored(self.top_k, self.weights, self.temperature)

    @property
    def whole(self) -> bool:
        """As the inner router."""
        return self.inner.whole

    @property
    def remembers(self) -> bool:
        """Yes."""
        return True

    def memory(self, real: Tensor, past: Past | None) -> Memory:
        """Of a pass."""
        return Memory(real, self.half_life, past, prior=self.prior)

    def check(self, names: Sequence[str], modules: Sequence[str]) -> None:
        """The inner router must fit, and some module must give evidence."""
        self.inner.check(names, modules)
        if not any(self._gives(module) for module in modules):
            raise ConfigError(f"evidence={self.evidence!r} names no adapted module")

    def scores(self, seen: Seen) -> Tensor:
        """(T, E) pooled evidence.

        Raises:
            UnsupportedRuntimeError: The module runs outside of a pass of the whole model, or
                reads other tokens than the pass has.
        """
        memory = _memory_of(seen)
        if memory.empty or self._gives(seen.module):
            memory.add(self._evidence(seen), seen.directions.available)
        return memory.pooled().to(seen.hidden.device)

    def _gives(self, module: str) -> bool:
        return Site(module).matches(self.evidence)

    def _evidence(self, seen: Seen) -> Tensor:
        """(T, E) less the mean over adapters, which says nothing of which."""
        scores_TE, directions = self.inner.scores(seen.rough or seen), seen.directions
        if directions.count == len(directions.names):
            return scores_TE - scores_TE.mean(1, keepdim=True)
        scores_TE = scores_TE.masked_fill(~directions.available, 0.0)
        return scores_TE - scores_TE.sum(1, keepdim=True) / directions.count


def _memory_of(seen: Seen) -> Memory:
    """The memory of a pass over the very tokens that the module reads."""
    memory = seen.memory
    if memory is None:
        raise UnsupportedRuntimeError(
            f"module {seen.module!r} runs on its own, or is computed again for gradient "
            f"checkpointing: Pooled gathers evidence over a whole pass. Run the composed "
            f"model, without checkpointing; or use a router without memory, such as SpectR."
        )
    if len(seen.hidden) != memory.tokens:
        raise UnsupportedRuntimeError(
            f"module {seen.module!r} reads {len(seen.hidden)} tokens of a pass over "
            f"{memory.tokens}: Pooled cannot tell which they are (a head that reads the last one, "
            f"an expert that gets its own, keys of a whole cache). Leave that module out of the "
            f"adapters, or use a router without memory, such as SpectR."
        )
    return memory


def measured(router: Router) -> Router:
    """The router whose scores a calibration is of: itself, or what is inside of it."""
    giving = router.inner if isinstance(router, Pooled) else router
    return giving.inner if isinstance(giving, Calibrated) else giving


def calibrated(router: Router, levels: Mapping[str, Level]) -> Router:
    """The same router with comparable scores, or comparable evidence."""
    if isinstance(router, Pooled):
        return replace(router, inner=calibrated(router.inner, levels))
    return Calibrated(measured(router), levels)


def is_calibrated(router: Router) -> bool:
    """Whether a router's scores, or its evidence, are calibrated."""
    return isinstance(router.inner if isinstance(router, Pooled) else router, Calibrated)
