"""Editing scores inside a router that runs its own code.

A family's selection rule lives in the forward of its router. To change what it selects from, we let
that very code run and change single values on their way: the result of the gate's linear map, the
result of the score function, and what top-k reads. So no selection rule is written down twice.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from expertmix.bindings.discovery import Block, is_wrapped
from expertmix.bindings.families import BY_TOKEN_ID, NO_PROBABILITIES
from expertmix.core.intervention import Stage
from expertmix.core.protocols import Tap
from expertmix.errors import InterventionError, StageError

_LINEAR = frozenset({"linear", "mm", "matmul"})
_SCORES = frozenset({"softmax", "sigmoid", "sqrt"})  # sqrt closes sqrt(softplus(x))


class Rescoring(TorchFunctionMode):
    """Edits one block's scores between the start of its router and the call of its experts."""

    def __init__(self, block: Block, tap: Tap) -> None:
        super().__init__()
        self._block = block
        self._tap = tap
        self._site = block.info.site
        self._armed = False
        self._depth = ExitStack()
        self._pending: set[Stage] = set()

    def enter(self) -> None:
        """The block starts."""
        self._depth.enter_context(self)

    def leave(self) -> None:
        """The block is left, also by an exception."""
        self._armed = False
        self._depth.close()

    def arm(self) -> None:
        """The router starts."""
        stages = (Stage.LOGITS, Stage.PROBABILITIES, Stage.SELECTION)
        self._pending = {stage for stage in stages if self._tap.edits(self._site, stage)}
        self._refuse_what_cannot_work()
        self._armed = True

    def disarm(self) -> None:
        """The experts start: everything that was asked for must have happened by now.

        Raises:
            StageError: The router never showed the stage.
        """
        if not self._armed:
            return
        self._armed = False
        if self._pending:
            stage = sorted(self._pending)[0]
            raise StageError(
                f"the router at {self._site} ({type(self._block.router).__name__}) has no stage "
                f"'{stage}': it selects on other values. Use another stage, or Ablate."
            )

    def gate(self, logits: Tensor) -> Tensor:
        """Edit what a wrapped gate gave."""
        due = self._armed and Stage.LOGITS in self._pending
        return self._edit(Stage.LOGITS, logits) if due else logits

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the operation; change its input or its result where a stage is due."""
        kwargs = kwargs or {}
        if not self._armed:
            return func(*args, **kwargs)
        name = func.__name__
        if name == "topk" and Stage.SELECTION in self._pending:
            args = (self._forbid(args[0]), *args[1:])
        result = func(*args, **kwargs)
        if (
            name in _LINEAR
            and Stage.LOGITS in self._pending
            and self._is_gate(args, kwargs, result)
        ):
            return self._edit(Stage.LOGITS, result)
        if name in _SCORES and Stage.PROBABILITIES in self._pending and self._is_wide(result):
            return self._edit(Stage.PROBABILITIES, result)
        return result

    def _is_gate(self, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> bool:
        if is_wrapped(self._block.gate) or not self._is_wide(result):
            return False
        weight = args[1] if len(args) > 1 else kwargs["weight"]
        return self._block.width in weight.shape

    def _is_wide(self, scores: Tensor) -> bool:
        return scores.shape[-1] == self._block.width

    def _edit(self, stage: Stage, scores: Tensor) -> Tensor:
        self._pending.discard(stage)
        experts = self._block.info.num_experts
        flat_TW = scores.reshape(-1, self._block.width)
        edited_TE = self._tap.edit_scores(self._site, stage, flat_TW[:, :experts])
        if stage is Stage.LOGITS and not self._selects_by_topk():
            self._pending.discard(Stage.SELECTION)
        return torch.cat([edited_TE, flat_TW[:, experts:]], 1).view(scores.shape)

    def _forbid(self, scores: Tensor) -> Tensor:
        """Minus infinity for banned experts in what a top-k reads, whole or in groups."""
        banned_TE = self._tap.banned(self._site, scores.device)
        experts = self._block.info.num_experts
        whole = scores.shape[-1] in (experts, self._block.width)
        if banned_TE is None or not (whole or scores.numel() == banned_TE.numel()):
            return scores
        if whole:
            self._pending.discard(Stage.SELECTION)
            banned_TE = torch.nn.functional.pad(banned_TE, (0, scores.shape[-1] - experts))
        return scores.masked_fill(banned_TE.view(scores.shape), float("-inf"))

    def _selects_by_topk(self) -> bool:
        return type(self._block.router).__name__ not in NO_PROBABILITIES

    def _refuse_what_cannot_work(self) -> None:
        kind = type(self._block.router).__name__
        if self._pending and kind in BY_TOKEN_ID:
            raise InterventionError(
                f"the router at {self._site} looks experts up by token id, not by score: nothing "
                f"can be edited before selection. Use Ablate, or Reweight at the stage 'weights'."
            )
        if Stage.PROBABILITIES in self._pending and kind in NO_PROBABILITIES:
            raise StageError(
                f"the router at {self._site} ({kind}) takes another softmax for each selected "
                f"expert; edit its logits instead"
            )
