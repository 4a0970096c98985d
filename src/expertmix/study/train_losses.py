"""Losses: of validation blocks, and those that models of transformers take of their routers."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import default_data_collator

from expertmix.study.train_blocks import IGNORED, Blocks


def loss_sums(
    blocks: Blocks, rows: int, place: tuple[int, int], loss_of: Callable[[dict[str, Any]], Tensor]
) -> Tensor:
    """Sum of the losses of all tokens, and how many there are, of what one process has to read.

    Args:
        blocks: To validate on.
        rows: Of a batch.
        place: Number of the process, and of how many. Each reads equally many batches, since they
            may need each other; what is too much for the last ones has no weight.
        loss_of: Mean loss of a batch.
    """
    rank, world = place
    sums = torch.zeros(2, dtype=torch.float64)
    for start in range(0, len(blocks), rows * world):
        first = start + rank * rows
        mine = range(first, min(first + rows, len(blocks)))
        batch: dict[str, Any] = default_data_collator([blocks[row] for row in mine or range(1)])
        targets = float((batch["labels"][:, 1:] != IGNORED).sum()) if mine else 0.0
        sums += torch.tensor([float(loss_of(batch)) * targets, targets], dtype=torch.float64)
    return sums.float()


def has_router_losses(model: Any) -> bool:
    """Whether the model adds losses of its routers to its loss, when it is asked to."""
    base = model.get_base_model() if _adapted(model) else model
    names = ("router_aux_loss_coef", "router_z_loss_coef")
    weighted = any(getattr(base.config, name, 0) for name in names)
    return weighted and "output_router_logits" in signature(base.forward).parameters


def aux_weight(model: Any) -> float:
    """What `aux_loss` of the outputs is multiplied by in the loss; of a CoE it is in it already."""
    config = model.config
    return 1.0 if config.model_type == "coe" else float(config.router_aux_loss_coef)


def _adapted(model: Any) -> bool:
    from peft import PeftModel

    return isinstance(model, PeftModel)
