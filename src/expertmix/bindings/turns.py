"""Whose turn it is in a chain of experts: `Turns`, kept by hooks while somebody listens.

A chain calls the same experts in every iteration, and perhaps the same router. So a hook on these
must ask which iteration runs now, and act in its own only.

Knows iterations and their numbers; not what a hook is for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from torch import nn

from expertmix.bindings.discovery import Block
from expertmix.errors import UnsupportedRuntimeError
from expertmix.experts.chain import Chain


class Turn:
    """Of one chain.

    Args:
        name: Of the chain.
        depth: How many iterations have a site.

    Attributes:
        number: The iteration that runs now; None between them.
    """

    def __init__(self, name: str, depth: int) -> None:
        self.number: int | None = None
        self._name, self._depth = name, depth

    def begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """An iteration starts.

        Raises:
            UnsupportedRuntimeError: One that has no site.
        """
        self.number = args[1]
        if args[1] >= self._depth:
            raise UnsupportedRuntimeError(
                f"{self._name} runs iteration {args[1]}, and had {self._depth} of them when it was "
                f"opened: set config.active_iterations before the block"
            )

    def end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """An iteration is left, also by an exception."""
        self.number = None


class Turns:
    """Of all chains of a model; a model without chains gets no hook.

    Args:
        blocks: All blocks of the model.
        stack: Holds the hooks.
    """

    def __init__(self, blocks: Sequence[Block], stack: ExitStack) -> None:
        self._turns: dict[Chain, Turn] = {}
        for block in blocks:
            if block.chain is None or block.chain in self._turns:
                continue
            depth = sum(one.chain is block.chain for one in blocks)
            turn = self._turns[block.chain] = Turn(block.info.site.name, depth)
            for iteration in block.chain.iterations:
                stack.callback(iteration.register_forward_pre_hook(turn.begin).remove)
                stack.callback(iteration.register_forward_hook(turn.end, always_call=True).remove)

    def here(self, block: Block) -> Callable[[], bool]:
        """Tells whether this block runs now, to a hook on its experts; a plain one always does."""
        return self._at(block, block.info.site.step)

    def routing(self, block: Block) -> Callable[[], bool]:
        """The same, to a hook on its router, which a kept decision has from the first iteration."""
        return self._at(block, 0 if block.held else block.info.site.step)

    def forget(self) -> None:
        """Nothing runs: torch calls no hook after a KeyboardInterrupt."""
        for turn in self._turns.values():
            turn.number = None

    def _at(self, block: Block, number: int) -> Callable[[], bool]:
        if block.chain is None:
            return _always
        turn = self._turns[block.chain]
        return lambda: turn.number == number


def _always() -> bool:
    return True
