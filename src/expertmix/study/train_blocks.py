"""Documents as blocks of tokens, and the order in which training sees them.

The order depends on texts, tokenizer and seed alone: models that are compared see the same batches.

Legend: N blocks, S tokens of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from expertmix.errors import ConfigError

IGNORED = -100
"""The label of what no loss is taken of, in transformers."""


def pack(texts: Sequence[str], tokenizer: Any, length: int, *, joined: bool = True) -> Tensor:
    """Texts as blocks: (N, S) int32 token ids, -1 where a block is padded.

    Args:
        texts: In the order in which they are to be joined.
        tokenizer: Of transformers, with an end-of-text token, which is put behind each text.
        length: S.
        joined: Cut all texts, joined, into full blocks; the rest at the end is left off.
            Otherwise each text begins a block, and its last one is padded.

    Raises:
        ConfigError: Too little text for one block, or no end-of-text token.
    """
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer has no end-of-text (eos) token: choose another one")
    if not texts:
        return torch.empty((0, length), dtype=torch.int32)
    encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    documents = [torch.tensor([*ids, tokenizer.eos_token_id], dtype=torch.int32) for ids in encoded]
    if not joined:
        return torch.cat([_padded(ids, length) for ids in documents])
    stream = torch.cat(documents)
    count = len(stream) // length
    if not count:
        raise ConfigError(
            f"{len(stream)} tokens are too few for one block of sequence_length={length}: give "
            f"more text, or a smaller sequence_length"
        )
    return stream[: count * length].view(count, length)


def _padded(ids: Tensor, length: int) -> Tensor:
    blocks = -(-len(ids) // length)
    return torch.cat([ids, ids.new_full((blocks * length - len(ids),), -1)]).view(blocks, length)


class Blocks(Dataset[dict[str, Tensor]]):
    """Blocks in the order of a run: epoch after epoch, each shuffled by seed and number.

    Args:
        blocks_NS: As `pack` makes them.
        pad: Id that stands where a block is padded.
        seed: Of the order; None keeps them as they are.
        rows: How many blocks the run sees; one pass by default.
    """

    def __init__(
        self, blocks_NS: Tensor, pad: int, *, seed: int | None = None, rows: int | None = None
    ) -> None:
        self._blocks_NS = blocks_NS
        self._pad = pad
        self._seed = seed
        self._rows = len(blocks_NS) if rows is None else rows
        self._epoch = -1
        self._order_N = torch.arange(len(blocks_NS))
        self._padded = bool((blocks_NS < 0).any())

    def __len__(self) -> int:
        return self._rows

    def number(self, row: int) -> int:
        """Which block stands at a place of the order."""
        epoch, place = divmod(row, len(self._blocks_NS))
        if self._seed is not None and epoch != self._epoch:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            self._order_N = torch.randperm(len(self._blocks_NS), generator=generator)
            self._epoch = epoch
        return int(self._order_N[place])

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        """`input_ids` and `labels`, and an `attention_mask` where a block is padded: (S,) each."""
        ids_S = self._blocks_NS[self.number(row)].long()
        padded_S = ids_S < 0
        found = {
            "input_ids": ids_S.masked_fill(padded_S, self._pad),
            "labels": ids_S.masked_fill(padded_S, IGNORED),
        }
        if self._padded:
            found["attention_mask"] = (~padded_S).long()
        return found
