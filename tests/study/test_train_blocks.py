from __future__ import annotations

import pytest
import torch

from expertmix.errors import ConfigError
from expertmix.study.train_blocks import IGNORED, Blocks, pack
from expertmix.testing import tiny_tokenizer


def test_packing_joins_documents_with_the_end_of_text() -> None:
    """Every token is kept in order, up to the rest at the end; each document ends with eos."""
    tokenizer = tiny_tokenizer()
    blocks_NS = pack(["abc", "de", "f"], tokenizer, 4)
    eos = tokenizer.eos_token_id
    ids = tokenizer("abcdef")["input_ids"]
    expected = [*ids[:3], eos, *ids[3:5], eos, ids[5]]
    assert blocks_NS.tolist() == [expected[:4], expected[4:]]


def test_without_packing_each_document_begins_a_block() -> None:
    """It is padded at its end, where no loss is taken and nothing is looked at."""
    tokenizer = tiny_tokenizer()
    blocks = Blocks(pack(["abcde", "f"], tokenizer, 4, joined=False), pad=0)
    assert len(blocks) == 3
    row = blocks[1]
    assert row["input_ids"].tolist()[2:] == [0, 0]
    assert row["labels"].tolist()[2:] == [IGNORED, IGNORED]
    assert row["attention_mask"].tolist() == [1, 1, 0, 0]
    assert "attention_mask" not in Blocks(pack(["abcdefgh"], tokenizer, 4), pad=0)[0]


def test_too_little_text_is_told() -> None:
    """With the number of tokens; and a tokenizer without an end of text."""
    tokenizer = tiny_tokenizer()
    with pytest.raises(ConfigError, match="4 tokens are too few for one block"):
        pack(["abc"], tokenizer, 8)
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="no end-of-text"):
        pack(["abc"], tokenizer, 2)


def test_the_order_depends_on_the_seed_alone() -> None:
    """Each epoch is a permutation, another one each time, and the same for the same seed."""
    blocks_NS = torch.arange(14, dtype=torch.int32).view(7, 2)
    order = [Blocks(blocks_NS, 0, seed=1, rows=21).number(row) for row in range(21)]
    assert order == [Blocks(blocks_NS, 0, seed=1, rows=21).number(row) for row in range(21)]
    assert order != [Blocks(blocks_NS, 0, seed=2, rows=21).number(row) for row in range(21)]
    epochs = [order[start : start + 7] for start in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_place_can_be_looked_up_in_any_order() -> None:
    """Resuming begins in the middle."""
    blocks_NS = torch.arange(14, dtype=torch.int32).view(7, 2)
    blocks = Blocks(blocks_NS, 0, seed=1, rows=21)
    forward = [blocks.number(row) for row in range(21)]
    assert [blocks.number(row) for row in reversed(range(21))] == forward[::-1]
