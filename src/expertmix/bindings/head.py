"""Log-probabilities of the tokens that are asked for, and a head that computes no others.

The head is the dearest linear map of a small model. So what enters it is packed: only the columns
that predict something, of all rows side by side. The model's own forward runs around it.

Legend: B rows, O options, W longest option, N columns that predict, M predicted tokens, V words.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


@dataclass(frozen=True, eq=False, slots=True)
class Predictions:
    """Who predicts what in one pass.

    Attributes:
        columns: (N,) flat numbers of the tokens of the pass that predict something.
        source: (M,) which of the N predicts.
        target: (M,) the token id that it predicts.
        place: (M,) flat place in (B, O, W).
        shape: (B, O, W).
    """

    columns: Tensor
    source: Tensor
    target: Tensor
    place: Tensor
    shape: tuple[int, ...]

    @classmethod
    def of(cls, source_BOW: Tensor, target_BOW: Tensor, predicted_BOW: Tensor) -> Predictions:
        """Of flat token numbers, and where there is something to predict."""
        place = predicted_BOW.flatten().nonzero().flatten()
        unique: Any = torch.unique
        columns, source = unique(source_BOW.flatten()[place], return_inverse=True)
        return cls(columns, source, target_BOW.flatten()[place], place, tuple(source_BOW.shape))

    def logprobs(self, logits_NV: Tensor) -> Tensor:
        """(B, O, W) float32, 0 where nothing is predicted."""
        apply: Any = _LogProbs.apply
        found_M: Tensor = apply(logits_NV.float(), self.source, self.target)
        size = self.shape[0] * self.shape[1] * self.shape[2]
        return found_M.new_zeros(size).index_copy(0, self.place, found_M).view(self.shape)


class Head:
    """The output layer of a causal LM, which packs what enters it where it is told to.

    Args:
        lm: The model, or a part of it with the same output layer.
    """

    def __init__(self, lm: Any) -> None:
        self._layer: nn.Module | None = lm.get_output_embeddings()
        self._columns: Tensor | None = None
        self._packed = False

    @contextmanager
    def packing(self, predictions: Predictions) -> Iterator[None]:
        """Pack what the passes in this block give to the head."""
        self._columns, self._packed = predictions.columns, False
        hook = self._layer.register_forward_pre_hook(self._pack) if self._layer else None
        try:
            yield
        finally:
            self._columns = None
            if hook is not None:
                hook.remove()

    def logits(self, output: Any, predictions: Predictions) -> Tensor:
        """(N, V) from the output of a pass that ran in the block."""
        logits: Tensor = output.logits
        logits = logits.reshape(-1, logits.shape[-1])
        return logits if self._packed else logits[predictions.columns]

    def _pack(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        if self._columns is None or len(args) != 1:
            return None
        self._packed = True
        return args[0].flatten(0, 1)[None, self._columns]


class _LogProbs(torch.autograd.Function):
    """log softmax at single places; its backward makes one table of (N, V), not four."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, source: Tensor, target: Tensor) -> Tensor:
        logprobs_NV = logits_NV.log_softmax(1)
        ctx.save_for_backward(logprobs_NV, source, target)
        return logprobs_NV[source, target]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_M: Tensor) -> tuple[Tensor, None, None]:
        logprobs_NV, source, target = ctx.saved_tensors
        share_N = grad_M.new_zeros(len(logprobs_NV)).index_add_(0, source, grad_M)
        grad_NV = logprobs_NV.exp().mul_(-share_N[:, None])
        return grad_NV.index_put_((source, target), grad_M, accumulate=True), None, None
