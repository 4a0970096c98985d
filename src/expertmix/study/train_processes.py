"""Several processes that torchrun started: how many, which one writes, and where they meet."""

from __future__ import annotations

import os


def world_size() -> int:
    """Processes that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return int(os.environ.get("RANK", "0")) == 0


def meet(*, processor: bool) -> None:
    """Let the processes know each other; does nothing for a single one.

    Args:
        processor: Run on the processor even where there is an accelerator.
    """
    if world_size() > 1:
        from accelerate import PartialState

        PartialState(cpu=processor)


def wait() -> None:
    """Until all processes are here."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()
