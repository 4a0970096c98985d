"""Experts that are called for what counts, and for nothing else; `Sparing`.

Padding calls no expert. A decision token that calls more than K experts is spread over several rows
of K beside other tokens, so that none of them gets wider. And where the experts' input never
changes (the first critical site of a suffix), only decision tokens call them again, and only until
what each expert gives is known: from then on it is weighed.

Knows an experts module that is called with (hidden, expert numbers, weights), token by token.

Legend: T tokens of the pass, H hidden, K selected experts, V experts called by a decision token.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from expertmix.bindings.discovery import Block
from expertmix.bindings.pathway_tap import PathwayTap

_KEPT = 1 << 26  # numbers that are kept of single experts, at most


@dataclass(eq=False)
class Fixed:
    """What the experts of one site gave, where their input stays the same from pass to pass.

    Attributes:
        output: (T, H) of an earlier pass; right for all tokens but the decision tokens.
        each: (n, E, H) what each expert gives each decision token, where that is known.
        known: (n, E) bool.
    """

    output: Tensor | None = None
    each: Tensor | None = None
    known: Tensor | None = None

    def lacking(self, experts_nV: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Tokens, and an expert of `count` for each, that must be called first; one at least."""
        n = len(experts_nV)
        if self.known is None:
            self.known = torch.zeros(n, count, dtype=torch.bool, device=experts_nV.device)
        wanted = torch.zeros_like(self.known).scatter_(1, experts_nV.long(), True)
        tokens, experts = (wanted & ~self.known).nonzero(as_tuple=True)
        if not len(tokens):
            return tokens.new_zeros(1), experts_nV[0, :1].long()
        return tokens, experts

    def learn(self, tokens_P: Tensor, experts_P: Tensor, given_PH: Tensor) -> None:
        """What these experts gave these tokens."""
        assert self.known is not None, "asked before"
        if self.each is None:
            self.each = given_PH.new_zeros(*self.known.shape, given_PH.shape[1])
        self.each[tokens_P, experts_P] = given_PH.detach()
        self.known[tokens_P, experts_P] = True

    def weighed(self, experts_nV: Tensor, weights_nV: Tensor) -> Tensor:
        """(n, H) of known experts with these weights."""
        assert self.each is not None, "learned before"
        tokens_n1 = torch.arange(len(experts_nV), device=experts_nV.device)[:, None]
        each_nVH = self.each[tokens_n1, experts_nV.long()]
        return (weights_nV[:, None].to(each_nVH.dtype) @ each_nVH)[:, 0]


@dataclass(eq=False)
class Sparing:
    """Hooks on the experts modules of one model.

    Attributes:
        tap: Knows the decision tokens.
        counting: (N,) flat numbers of the tokens of the next pass that count; None for all.
        fixed: Of the site whose input stays the same, in the next pass.
    """

    tap: PathwayTap
    counting: Tensor | None = None
    fixed: Fixed | None = None

    def rest(self) -> None:
        """Forget the last pass."""
        self.counting, self.fixed = None, None

    def hook(
        self, block: Block, here: Callable[[], bool], stack: ExitStack, *, first: bool
    ) -> None:
        """Hook a block's experts.

        Args:
            block: It may share them with others.
            here: Whether it is this block that calls them now.
            stack: Holds the hooks.
            first: Whether their input may stay the same.
        """
        call = _Call(self, block.info.top_k, here, first)
        stack.callback(block.experts.register_forward_pre_hook(call.before).remove)
        stack.callback(block.experts.register_forward_hook(call.after).remove)


@dataclass(eq=False)
class _Call:
    """One block's call of its experts, from start to end."""

    sparing: Sparing
    top_k: int
    here: Callable[[], bool]
    first: bool
    shape: torch.Size = field(default_factory=torch.Size)
    rows: Tensor | None = None
    owners: Tensor | None = None
    base: Tensor | None = None
    called: tuple[Tensor, Tensor] | None = None
    weighed: tuple[Tensor, Tensor] | None = None

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        if not self.here():
            return args
        placed = self.sparing.tap.placed
        self.shape, self.owners, self.base = args[0].shape[:-1], None, self._unchanged()
        self.rows, self.weighed = self.sparing.counting, None
        if self.base is not None and placed is not None:
            self.rows = placed.rows
        wide = placed is not None and args[1].shape[-1] > self.top_k
        if self.rows is None and not wide:
            return args
        hidden_TH, indices_TV, weights_TV = (one.flatten(0, -2) for one in args)
        if placed is not None and self.rows is not None and len(self.rows) == len(placed.rows):
            if not self.first and len(self.rows) == self.shape.numel():
                self.rows = None  # every token decides: there is nothing to spare
                return args
            picked = self._picked(hidden_TH, indices_TV, weights_TV, indices_TV.shape[1])
            return self._one_by_one(placed.values.shape[-1], *picked)
        calls = [self._picked(hidden_TH, indices_TV, weights_TV, self.top_k)]
        if placed is not None and wide:
            rows = placed.rows.to(hidden_TH.device)
            calls += _spread(rows, hidden_TH, indices_TV, weights_TV, self.top_k)
            self.owners = rows.repeat(len(calls) - 1)
        return tuple(torch.cat(parts) for parts in zip(*calls, strict=True))

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Any:
        if not self.here() or (self.rows is None and self.owners is None):
            return output
        given_NH, base, tokens = output.flatten(0, -2), self.base, self.shape.numel()
        fixed = self.sparing.fixed
        if fixed is not None and self.called is not None and self.weighed is not None:
            fixed.learn(*self.called, given_NH)
            given_NH = fixed.weighed(*self.weighed)
        own = len(given_NH) - (0 if self.owners is None else len(self.owners))
        if self.rows is None:
            result_TH = given_NH[:own]
        else:
            if base is None:
                base = given_NH.new_zeros(tokens, given_NH.shape[1])
            result_TH = base.index_copy(0, self.rows.to(base.device), given_NH[:own])
        if self.owners is not None:
            result_TH = result_TH.index_add(0, self.owners, given_NH[own:])
        if self.first and fixed is not None and self.base is None:
            fixed.output = result_TH.detach()
        self.rows = self.owners = self.base = self.called = self.weighed = None
        return result_TH.view(*self.shape, -1)

    def _one_by_one(
        self, count: int, hidden_nH: Tensor, experts_nV: Tensor, weights_nV: Tensor
    ) -> tuple[Tensor, ...]:
        """Where this is kept, a row for each expert that was not called before; else all rows."""
        fixed = self.sparing.fixed
        if not self.first or fixed is None or count * hidden_nH.numel() > _KEPT:
            return hidden_nH, experts_nV, weights_nV
        self.called, self.weighed = fixed.lacking(experts_nV, count), (experts_nV, weights_nV)
        tokens_P, experts_P = self.called
        ones_P1 = torch.ones_like(experts_P, dtype=weights_nV.dtype)[:, None]
        return hidden_nH[tokens_P], experts_P[:, None].to(experts_nV.dtype), ones_P1

    def _unchanged(self) -> Tensor | None:
        fixed = self.sparing.fixed
        return fixed.output if self.first and fixed is not None else None

    def _picked(
        self, hidden: Tensor, indices: Tensor, weights: Tensor, width: int
    ) -> tuple[Tensor, ...]:
        """The rows that count, so wide."""
        narrow = indices[:, :width], weights[:, :width]
        if self.rows is None:
            return hidden, *narrow
        rows = self.rows.to(hidden.device)
        return tuple(one[rows] for one in (hidden, *narrow))


def _spread(
    rows: Tensor, hidden_TH: Tensor, indices_TV: Tensor, weights_TV: Tensor, top_k: int
) -> list[tuple[Tensor, ...]]:
    """The decision tokens' experts beyond the first K, K by K; zero weights fill the last ones."""
    lacking = (0, -indices_TV.shape[1] % top_k)
    wide = [nn.functional.pad(one[rows], lacking) for one in (indices_TV, weights_TV)]
    starts = range(top_k, wide[0].shape[1], top_k)
    return [(hidden_TH[rows], *(one[:, start : start + top_k] for one in wide)) for start in starts]
