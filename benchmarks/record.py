"""What recording costs: time of a forward with and without it, bytes of a trace, memory of a run.

Prints `name: value` lines. Times are process CPU time on one thread, measured in alternating pairs
in one process, so that a loaded machine blurs both sides alike; a ratio of 1.02 means 2 % slower.

    python benchmarks/record.py [--quick] [--save]
"""

from __future__ import annotations

import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import figures
import torch
from torch import nn

import expertmix as em
from expertmix.bindings.discovery import find_blocks
from expertmix.bindings.families import TESTED
from expertmix.testing import tiny_moe

Run = Callable[[], object]
Block = Callable[[], AbstractContextManager[object]]


def measure(quick: bool) -> Iterator[tuple[str, float]]:
    """All figures, in the order in which they are printed."""
    model = olmoe()
    yield "parameters_millions", sum(p.numel() for p in model.parameters()) / 1e6
    yield from overheads(model, repeats=2 if quick else 9, steps=8 if quick else 24)
    yield from sizes(tiny_moe("olmoe", num_hidden_layers=16, num_experts=64, num_experts_per_tok=8))
    yield from long_run(tokens=30_000 if quick else 1_000_000)
    yield "architectures_passing", float(sum(passes(name) for name in TESTED))


def olmoe() -> nn.Module:
    """453M random parameters in OLMoE's shape: 16 layers, top-8 of 64."""
    return tiny_moe(
        "olmoe",
        hidden_size=512,
        intermediate_size=256,
        num_hidden_layers=16,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=64,
        num_experts=64,
        num_experts_per_tok=8,
        vocab_size=32000,
        max_position_embeddings=4096,
    )


def overheads(model: nn.Module, *, repeats: int, steps: int) -> Iterator[tuple[str, float]]:
    """Recorded time by plain time, for prefill (8 × 128) and for decoding with a cache."""
    ids = torch.randint(3, 32000, (8, 128), generator=torch.Generator().manual_seed(0))
    watchers: dict[str, Block] = {
        "": lambda: em.record(model),
        "logits_": lambda: em.record(model, logits=True),
        "handwritten_": lambda: handwritten(model),
        **moewatch(model),
    }
    for name, block in watchers.items():
        yield f"{name}prefill_overhead_ratio", ratio(lambda: model(ids), block, repeats)
    for name, block in watchers.items():
        decode = decoding(model, ids[:1, :32], steps)
        yield f"{name}decode_overhead_ratio", ratio(decode, block, repeats)


@torch.no_grad()
def ratio(run: Run, block: Block, repeats: int) -> float:
    """Median over pairs of time inside the block by time outside of it."""
    seconds(run, nullcontext)
    pairs = []
    for turn in range(repeats):
        order = [nullcontext, block] if turn % 2 else [block, nullcontext]
        taken = {which: seconds(run, which) for which in order}
        pairs.append(taken[block] / taken[nullcontext])
    return statistics.median(pairs)


def seconds(run: Run, block: Block) -> float:
    """CPU seconds of a run; opening and closing the block is not part of it."""
    with block():
        start = time.process_time()
        run()
        return time.process_time() - start


def decoding(model: nn.Module, prompt: torch.Tensor, steps: int) -> Run:
    """Greedy decoding, token by token."""
    generate: Any = model.generate

    def run() -> object:
        return generate(
            prompt, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, pad_token_id=0
        )

    return run


@contextmanager
def handwritten(model: nn.Module) -> Iterator[dict[str, list[torch.Tensor]]]:
    """What people write by hand: a hook on each router that appends its output to a list."""
    kept: dict[str, list[torch.Tensor]] = {}
    handles = []
    for block in find_blocks(model):
        assert block.router is not None
        rows = kept.setdefault(str(block.info.site), [])
        handles.append(
            block.router.register_forward_hook(
                lambda module, args, output, rows=rows: rows.append(
                    (output[1].detach().cpu(), output[2].detach().cpu())
                )
            )
        )
    yield kept
    for handle in handles:
        handle.remove()


def moewatch(model: nn.Module) -> dict[str, Block]:
    """The monitor of that name on PyPI, at its finest setting, where it is installed."""
    try:
        from moewatch import MoEWatch, OutputMode, WatchConfig
    except ImportError:
        return {}
    names = [f"{block.info.site.name}.gate" for block in find_blocks(model)]
    config = WatchConfig(router_modules=names, sample_every=1, output=OutputMode.SILENT)
    return {"moewatch_": lambda: MoEWatch(model, config=config)}


def sizes(model: nn.Module) -> Iterator[tuple[str, float]]:
    """Bytes per token of a saved trace, weights in either precision."""
    ids = torch.randint(3, 96, (64, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), em.record(model) as trace:
        model(ids)
    with tempfile.TemporaryDirectory() as folder:
        for weights in ("float16", "float32"):
            path = trace.save(Path(folder) / f"{weights}.parquet", weights=weights)
            name = (
                "trace_bytes_per_token"
                if weights == "float16"
                else f"trace_bytes_per_token_{weights}"
            )
            yield name, path.stat().st_size / len(trace)


def long_run(tokens: int) -> Iterator[tuple[str, float]]:
    """Growth of the process while a tiny model streams a long trace to disk."""
    model = tiny_moe("olmoe")
    ids = torch.randint(3, 90, (32, 64))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        with em.record(model, to=Path(folder) / "trace.parquet") as trace:
            for _ in range(10):
                model(ids)
            before = peak_megabytes()
            for _ in range(tokens // ids.numel()):
                model(ids)
            yield "memory_growth_mb", peak_megabytes() - before
        yield "streamed_tokens", float(len(trace))


def peak_megabytes() -> float:
    """Peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@torch.no_grad()
def passes(family: str) -> bool:
    """Recording a tiny model of the family changes no bit, and its replay reproduces the run."""
    model = tiny_moe(family)
    ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(0))
    plain = model(ids).logits
    with em.record(model) as trace:
        recorded = model(ids).logits
    with em.record(model, em.Replay(trace)):
        replayed = model(ids).logits
    return torch.equal(plain, recorded) and torch.equal(plain, replayed)


if __name__ == "__main__":
    figures.run("record", __doc__, "fewer repetitions", measure)
