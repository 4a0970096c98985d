"""Contestants measured in turn: process CPU time of prefill and of decoding steps.

All of a figure run in one process, round after round, so that a loaded machine blurs all alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from contestants import Contestant
from torch import Tensor


def in_turn(
    field: Mapping[str, Contestant], phase: str, *, rounds: int, steps: int
) -> dict[str, float]:
    """Median CPU seconds per prefill, or per decoding step, of each contestant."""
    run = prefill if phase == "prefill" else decode
    times: dict[str, list[float]] = {name: [] for name in field}
    for _ in range(rounds):
        for name, contestant in field.items():
            with torch.no_grad(), contestant.block():
                times[name].append(run(contestant.model, steps))
    return {name: statistics.median(found) for name, found in times.items()}


def prefill(model: Any, steps: int) -> float:
    """CPU seconds of one pass over 4 × 128 tokens, after one that warms up."""
    model(tokens(4, 128))
    return timed(lambda: model(tokens(4, 128)))[0]


def decode(model: Any, steps: int) -> float:
    """CPU seconds per step of decoding 4 sequences with a cache, after one that warms up."""
    start = model(tokens(4, 16), use_cache=True)
    cache = None if isinstance(start, Tensor) else start.past_key_values

    def run(count: int) -> None:
        for _ in range(count):
            model(tokens(4, 1), past_key_values=cache, use_cache=True)

    run(1)
    return timed(lambda: run(steps))[0] / steps


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of this process, and what came out."""
    start = time.process_time()
    result = run()
    return time.process_time() - start, result


def tokens(rows: int, columns: int) -> Tensor:
    """Random token ids."""
    return torch.randint(3, 500, (rows, columns), generator=torch.Generator().manual_seed(1))
