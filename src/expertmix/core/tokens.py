"""For whom a decision was made: the tokens of a trace, and those of one pass through a model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False, slots=True)
class Tokens:
    """N tokens, in the order in which the model read them.

    Attributes:
        sample: (N,) int64, number of the sequence within the recording, from 0.
        position: (N,) int64, place in that sequence, padding not counted; -1 for padding.
        token_id: (N,) int64; -1 where the model was given embeddings, or ids were left out.
        real: (N,) bool, False for padding.
    """

    sample: Tensor
    position: Tensor
    token_id: Tensor
    real: Tensor

    def __len__(self) -> int:
        return self.sample.shape[0]

    def cpu(self) -> Tokens:
        """The same on the CPU."""
        return Tokens(self.sample.cpu(), self.position.cpu(), self.token_id.cpu(), self.real.cpu())

    def rows(self, keep: Tensor) -> Tokens:
        """Some of the tokens: a (N,) bool mask or a vector of row numbers."""
        return Tokens(self.sample[keep], self.position[keep], self.token_id[keep], self.real[keep])


@dataclass(frozen=True, eq=False, slots=True)
class Pass:
    """The tokens of one pass through a model: rows × columns, flattened row by row.

    Attributes:
        tokens: The T = rows × columns tokens.
        row: (T,) int64, row of the batch.
        prompt_length: (T,) int64, real tokens in the first pass of the token's sample; negative
            positions count back from there, so that -1 is the last prompt token.
    """

    tokens: Tokens
    row: Tensor
    prompt_length: Tensor

    def __len__(self) -> int:
        return len(self.tokens)


def concatenate(parts: list[Tokens]) -> Tokens:
    """Join tokens in order."""
    if len(parts) == 1:
        return parts[0]
    return Tokens(
        torch.cat([part.sample for part in parts]),
        torch.cat([part.position for part in parts]),
        torch.cat([part.token_id for part in parts]),
        torch.cat([part.real for part in parts]),
    )


class Bookkeeper:
    """Numbers the samples and positions of a run from what each pass was given.

    A pass that starts from an empty cache begins new samples; one that continues a cache of the
    same batch size appends to the samples of the pass before it (decoding, chunked prefill).
    """

    def __init__(self) -> None:
        self._next_sample = 0
        self._lengths = torch.zeros(0, dtype=torch.int64)
        self._prompts = torch.zeros(0, dtype=torch.int64)

    def read(self, ids_BS: Tensor, real_BS: Tensor, *, continues: bool) -> Pass:
        """Place one pass.

        Args:
            ids_BS: (rows, columns) int64 token ids, or -1.
            real_BS: (rows, columns) bool, False for padding.
            continues: The model was given a cache that already holds tokens.
        """
        rows, columns = ids_BS.shape
        device = ids_BS.device
        counts_B = real_BS.sum(1).to(torch.int64)
        if not (continues and rows == len(self._lengths)):
            self._start(rows, counts_B)
        position_BS = self._lengths[:, None].to(device) + real_BS.cumsum(1) - 1
        position_BS = position_BS.masked_fill(~real_BS, -1)
        self._lengths = self._lengths.to(device) + counts_B
        row = torch.arange(rows, device=device).repeat_interleave(columns)
        tokens = Tokens(
            row + (self._next_sample - rows),
            position_BS.flatten(),
            ids_BS.flatten(),
            real_BS.flatten(),
        )
        return Pass(tokens, row, self._prompts.to(device)[row])

    def _start(self, rows: int, counts_B: Tensor) -> None:
        self._next_sample += rows
        self._lengths = torch.zeros_like(counts_B)
        self._prompts = counts_B
