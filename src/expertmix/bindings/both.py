"""A MoE with LoRA adapters on it: the sites of both, as one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

from expertmix.bindings.transformers import TransformersMoE
from expertmix.core.protocols import Tap
from expertmix.core.site import SiteInfo
from expertmix.experts.composed import Composed


class Both:
    """Adapters and MoE experts of one model.

    Args:
        composed: The adapters.
        moe: The experts.
    """

    def __init__(self, composed: Composed, moe: TransformersMoE) -> None:
        self.composed = composed
        self.moe = moe

    @property
    def name(self) -> str:
        """As the composition calls itself."""
        return self.composed.name

    @property
    def sites(self) -> tuple[SiteInfo, ...]:
        """All sites, in the order in which the model has their modules."""
        found: dict[str, list[SiteInfo]] = {}
        for info in (*self.composed.sites, *self.moe.sites):
            found.setdefault(info.site.name, []).append(info)
        paths = (path for path, _ in self.composed.model.named_modules())
        return tuple(info for path in paths for info in found.get(path, ()))

    @property
    def settings(self) -> dict[str, str]:
        """Of both."""
        return {**self.moe.settings, **self.composed.settings}

    @property
    def attached(self) -> bool:
        """Whether a tap is attached to either."""
        return self.composed.attached or self.moe.attached

    def fingerprint(self) -> str:
        """Hash of both."""
        both = f"{self.composed.fingerprint()} {self.moe.fingerprint()}"
        return hashlib.sha256(both.encode()).hexdigest()

    @contextmanager
    def attach(self, tap: Tap) -> Iterator[None]:
        """Report to the tap while the context is open; leave nothing behind."""
        with self.moe.attach(tap), self.composed.attach(tap):
            yield
