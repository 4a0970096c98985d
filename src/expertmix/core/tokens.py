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
        return self.to("cpu")

    def to(self, device: torch.device | str) -> Tokens:
        """The same on another device."""
        return Tokens(
            self.sample.to(device),
            self.position.to(device),
            self.token_id.to(device),
            self.real.to(device),
        )

    def rows(self, keep: Tensor) -> Tokens:
        """Some of the tokens: a (N,) bool mask or a vector of row numbers."""
        return Tokens(self.sample[keep], self.position[keep], self.token_id[keep], self.real[keep])


@dataclass(frozen=True, eq=False, slots=True)
class Pass:
    """The tokens of one pass through a model: rows × columns, flattened row by row.

    Attributes:
        tokens: The T = rows × columns tokens.
        row: (T,) int64, row of the batch.
        prompt_length: (T,) int64, real tokens up to the end of the first pass of the token's
            sample; negative positions count back from there, so that -1 is the last prompt token.
    """

    tokens: Tokens
    row: Tensor
    prompt_length: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def to(self, device: torch.device) -> Pass:
        """The same where a layer lives: one model may be spread over several devices."""
        if self.row.device == device:
            return self
        return Pass(self.tokens.to(device), self.row.to(device), self.prompt_length.to(device))


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

    A pass that starts from an empty cache begins new samples; one that continues the cache of the
    pass before it appends to its samples (decoding, chunked prefill). Where the cache was cut back
    in between (speculative decoding), positions go back with it. A cache that was filled elsewhere
    begins new samples, whose positions start behind it.
    """

    def __init__(self) -> None:
        self._next_sample = 0
        self._columns = 0  # of the cache, padding included
        self._lengths = torch.zeros(0, dtype=torch.int64)
        self._prompts = torch.zeros(0, dtype=torch.int64)

    def read(self, ids_BS: Tensor, real_BS: Tensor, *, past: int = 0) -> Pass:
        """Place one pass.

        Args:
            ids_BS: (rows, columns) int64 token ids, or -1.
            real_BS: (rows, columns) bool, False for padding.
            past: How many columns the cache holds that the model was given.
        """
        rows, columns = ids_BS.shape
        device = ids_BS.device
        counts_B = real_BS.sum(1).to(torch.int64)
        if 0 < past <= self._columns and rows == len(self._lengths):
            self._lengths = (self._lengths - (self._columns - past)).clamp(min=0)
        else:
            self._start(rows, counts_B, past)
        self._columns = past + columns
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

    def _start(self, rows: int, counts_B: Tensor, past: int) -> None:
        self._next_sample += rows
        self._lengths = torch.full_like(counts_B, past)
        self._prompts = counts_B + past
