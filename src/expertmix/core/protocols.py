"""What the core needs of a model, and what it offers to one.

A binding (or one of our own layers) implements `Routed`: it names its sites and, while attached,
reports every pass and every decision to a `Tap`, and uses what the tap gives back.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from expertmix.core.intervention import Stage
from expertmix.core.site import Site, SiteInfo


class Tap(Protocol):
    """The side of a recording that a binding talks to."""

    @property
    def open(self) -> bool:
        """Whether a pass is running.

        Raises:
            UnsupportedRuntimeError: It is running in another thread.
        """

    @property
    def grad(self) -> bool:
        """Whether weights must stay in the autograd graph."""

    def begin(self, ids_BS: Tensor, real_BS: Tensor, *, past: int = 0) -> None:
        """A pass starts, over tokens that `Bookkeeper.read` will number.

        Raises:
            UnsupportedRuntimeError: Another is running in another thread.
        """

    def end(self) -> None:
        """The pass is complete: keep what it reported."""

    def abandon(self) -> None:
        """The pass failed: forget what it reported."""

    def edits(self, site: Site, stage: Stage) -> bool:
        """Whether any intervention acts at this site and stage."""

    def edit_scores(self, site: Site, stage: Stage, scores_TE: Tensor) -> Tensor:
        """Edit scores before selection."""

    def banned(self, site: Site, device: torch.device) -> Tensor | None:
        """(T, E) bool: what interventions forbid at this site in this pass, or None."""

    def edit_decision(
        self, site: Site, indices_TK: Tensor, weights_TK: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Edit what was selected."""

    def saw(self, site: Site, indices_TK: Tensor, weights_TK: Tensor) -> None:
        """The experts got these."""

    def saw_logits(self, site: Site, logits_TE: Tensor) -> None:
        """The gate gave these."""

    def wants(self, site: Site) -> bool:
        """Whether this site is recorded."""

    def wants_logits(self) -> bool:
        """Whether logits are recorded."""


class Routed(Protocol):
    """Anything with routing decisions: a MoE model, adapters on a base, a consortium."""

    @property
    def name(self) -> str:
        """Name or path, for the trace."""

    @property
    def sites(self) -> Sequence[SiteInfo]:
        """All sites in the order in which they run."""

    @property
    def settings(self) -> dict[str, str]:
        """What else a trace should say: dtype, implementation."""

    def fingerprint(self) -> str:
        """Hash of structure and weights."""

    def attach(self, tap: Tap) -> AbstractContextManager[None]:
        """Report to the tap while the context is open; leave nothing behind."""
