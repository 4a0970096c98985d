"""A model opened for pathways, once: its tap, its hooks, and the way back to rest.

What the exact suffix and full passes have in common. Knows hooks; not what a pass reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property

from torch import nn

from expertmix.bindings.both import Both
from expertmix.bindings.discovery import Block
from expertmix.bindings.pathway_tap import PathwayTap
from expertmix.bindings.sparing import Sparing
from expertmix.bindings.still import refuse_attached, still
from expertmix.bindings.transformers import TransformersMoE
from expertmix.bindings.turns import Turns
from expertmix.core.site import SiteInfo
from expertmix.errors import ConfigError
from expertmix.experts.composed import Composed


class Session:
    """The hooks of one opening.

    Args:
        routed: The model as sites.
        lm: The model.
        moe: Its MoE blocks, if it has any.
        sites: The critical ones.
        shift: Whether pathways of mode `add` will come.

    Raises:
        ConfigError: They are to shift logits where a chain keeps a decision and has none.
    """

    def __init__(
        self,
        routed: TransformersMoE | Composed | Both,
        lm: nn.Module,
        moe: TransformersMoE | None,
        sites: Sequence[SiteInfo],
        *,
        shift: bool,
    ) -> None:
        self._routed, self._lm, self._moe = routed, lm, moe
        if shift:
            self._refuse_held(sites)
        self.tap = PathwayTap(sites, shift)
        self.sparing = Sparing(self.tap)
        self._turns: Turns | None = None

    @cached_property
    def fingerprint(self) -> str:
        """Of the model; read once."""
        return self._routed.fingerprint()

    @contextmanager
    def running(self, first: Block | None = None) -> Iterator[None]:
        """Hooks are in the model while this is open, and it is at rest.

        Args:
            first: The block whose experts see the same input in every pass, if one does.

        Raises:
            UnsupportedRuntimeError: The model is open already, or is being recorded.
        """
        refuse_attached(self._routed)
        with ExitStack() as stack:
            stack.callback(self.rest)
            stack.enter_context(still(self._lm))
            stack.enter_context(self._routed.attach(self.tap))
            blocks = () if self._moe is None else self._moe.blocks
            turns = self._turns = Turns(blocks, stack)
            for block in blocks:
                self.sparing.hook(block, turns.here(block), stack, first=block is first)
            yield

    def _refuse_held(self, sites: Sequence[SiteInfo]) -> None:
        for block in () if self._moe is None else self._moe.blocks:
            if block.held and block.info in sites:
                raise ConfigError(
                    f"{block.info.site} keeps the decision of the iteration before "
                    f"(gating='fixed') and has no logits to shift: with a method that shifts them, "
                    f"name first iterations only, such as layers='*#0'"
                )

    def rest(self) -> None:
        """Nothing is placed, and nothing that a broken pass left is armed."""
        self.tap.rest()
        self.sparing.rest()
        if self._turns is not None:
            self._turns.forget()
        if self._moe is not None:
            self._moe.recover()
