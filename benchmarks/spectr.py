"""What routing LoRA adapters costs: base, one PEFT adapter, PEFT's Arrow, a naive loop, and ours.

Prints `name: value` lines, on a random Llama of SmolLM2-135M's shape with fewer layers (and a
vocabulary smaller in proportion), in full also on the default model with the shipped library. Times
are process CPU time on one thread, all contestants of a figure measured in turn in one process,
medians of several rounds, so that a loaded machine blurs all alike: read the ratios.

`fused` is SpectR as a user gets it; `exact` scores in float32, `sieved` in bfloat16 first (the
default for large shelves), `bf16` projects in bfloat16 all the way, `lag` filters by first
directions. `pooled` is the default router, `pooled_part` with evidence from q_proj alone.

The floor of an exact score. E adapters of rank r at a module of input D and output O multiply T
tokens with E·r directions: 2·T·D·E·r operations, E·r/O of what the module itself costs, and in
decoding 4·D·E·r bytes against the module's 4·D·O. All linear, r = 16, E = 100, D = 576 (six
modules) and 1536 (one): 2·512·1600·(6·576 + 1536) = 8.2 GFLOP and 32 MB per layer, where the layer
has 3.6 GFLOP and 14 MB. `share_of_floor_E100` is (base + these products, measured on the same
matrices in the same turn) / ours: above 1 is less than any exact score of all adapters can take.
What the selected three add needs 2·T·3·r·(D + O) operations, 3 % of that.

Memory is the peak of what a forward pass without gradients holds at once beyond weights and
library, by the profiler's allocations, by that of the base: of the whole model with the real
vocabulary of 49152, whose logits are most of it, and of the body alone.

    python benchmarks/spectr.py [--quick] [--save]
"""

from __future__ import annotations

import tempfile
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import figures
import torch
from contestants import (
    LINEAR,
    QV,
    VOCABULARY,
    Case,
    Contestant,
    adapters,
    llama,
    naive_loop,
    one_adapter,
    ours,
    peft_arrow,
    write_library,
)
from torch import Tensor
from turns import in_turn, timed, tokens

from expertmix.core.record import record
from expertmix.experts.peft_folder import read_library
from expertmix.experts.shelf import Shelf
from expertmix.models.default import load_default
from expertmix.models.library import default_library
from expertmix.routers.lag import Lag
from expertmix.routers.pooled import Pooled

Figure = tuple[str, float]
PHASES = ("prefill", "decode")
LAG = Lag(m=20, top_k=3)


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    layers: int
    rounds: int
    steps: int
    cases: tuple[tuple[Case, tuple[int, ...]], ...]
    full: bool


QUICK = Size(1, 3, 8, ((QV, (32,)), (LINEAR, (100,))), full=False)
FULL = Size(6, 3, 16, ((QV, (8, 32, 100)), (LINEAR, (8, 32, 100))), full=True)


def measure(size: Size) -> Iterator[Figure]:
    """All figures, in the order in which they are printed."""
    for case, counts in size.cases:
        with tempfile.TemporaryDirectory() as folder:
            library = write_library(Path(folder), case, max(counts), size.layers)
            for count in counts:
                yield from compared(case, library[:count], size)
    yield from thousand(size)
    yield from memory(size)
    if size.full:
        yield from many_files()
        yield from default_model()


def compared(case: Case, library: list[Path], size: Size) -> Iterator[Figure]:
    """One library against all rivals: loading, prefill of 4 × 128 tokens, decoding of 4 rows."""
    mark = f"{case.name}_E{len(library)}"
    read_s, loaded = timed(lambda: list(read_library(library)))
    spectra_s, shelf = timed(lambda: Shelf.of(loaded))
    peft_s, rival = timed(lambda: peft_arrow(llama(size.layers), library))
    for name, seconds in (("read", read_s), ("spectra", spectra_s), ("peft", peft_s)):
        yield f"{mark}_load_{name}_cpu_s", seconds
    base = llama(size.layers)
    field = {
        "base": Contestant(base, nullcontext),
        "one_adapter": Contestant(one_adapter(llama(size.layers), library[0]), nullcontext),
        "peft_arrow": Contestant(rival, nullcontext),
        "naive_loop": Contestant(base, lambda: naive_loop(base, library)),
        "floor": Contestant(scoring(base, shelf), nullcontext),
        **contestants(base, shelf),
    }
    times = {phase: in_turn(field, phase, rounds=size.rounds, steps=size.steps) for phase in PHASES}
    for phase in PHASES:
        times[phase]["floor"] += times[phase]["base"]
        yield from lines(f"{mark}_{phase}", times[phase])
    yield from flips(mark, base, shelf)
    if mark == "qv8_E32":
        yield "prefill_share_of_one_adapter_E32", ratio(times, "prefill", "one_adapter")
        yield "decode_share_of_one_adapter_E32", ratio(times, "decode", "one_adapter")
    if mark == "all16_E100":
        yield "speedup_over_peft_arrow_E100", ratio(times, "prefill", "peft_arrow")
        yield "decode_speedup_over_peft_arrow_E100", ratio(times, "decode", "peft_arrow")
        yield "share_of_floor_E100", ratio(times, "prefill", "floor")
        yield "decode_share_of_floor_E100", ratio(times, "decode", "floor")
        yield "load_seconds_E100", read_s
        yield "spectra_seconds_E100", spectra_s


def contestants(base: Any, shelf: Shelf) -> dict[str, Contestant]:
    """Ours, in all ways."""
    return {
        "fused": ours(base, shelf),
        "exact": ours(base, shelf, "exact"),
        "bf16": ours(base, shelf, torch.bfloat16),
        "lag": ours(base, shelf, router=LAG),
        "pooled": ours(base, shelf, router=Pooled()),
        "pooled_part": ours(base, shelf, router=Pooled(evidence="*.q_proj")),
    }


def thousand(size: Size) -> Iterator[Figure]:
    """q and v, rank 8: 1000 adapters against the first 32 of them."""
    base, made = llama(size.layers), adapters(QV, 1000, size.layers)
    spectra_s, shelf = timed(lambda: Shelf.of(made))
    yield "qv8_E1000_load_spectra_cpu_s", spectra_s
    few = Shelf(shelf.adapters[:32])
    field = {"base": Contestant(base, nullcontext), "fused_E32": ours(base, few)}
    field |= contestants(base, shelf)
    for phase in PHASES:
        times = in_turn(field, phase, rounds=size.rounds, steps=size.steps)
        yield from lines(f"qv8_E1000_{phase}", times)
        by_few = {name: times[name] / times["fused_E32"] for name in contestants(base, shelf)}
        for name, value in by_few.items():
            yield f"qv8_E1000_{phase}_{name}_time_ratio_over_E32", value
        yield f"{'' if phase == 'prefill' else 'decode_'}time_ratio_E1000_over_E32", by_few["fused"]
    yield from flips("qv8_E1000", base, shelf)
    yield "qv8_E1000_lag_recall_of_top_3", 1 - flip(base, ours(base, shelf, router=LAG), shelf)


def scoring(base: Any, shelf: Shelf) -> Callable[..., Tensor]:
    """All directions times inputs of the right size and nothing else: run like a model."""
    rights: dict[int, Tensor] = {}
    with ours(base, shelf, "exact").block() as composed:
        routed: Any = composed
        plan = routed.plan
        for place in plan.places:
            width = place.linear.weight.shape[1]
            stack = plan.inputs[place.name].stack(torch.zeros(1, width))
            rights[id(stack)] = stack.right
    inputs = {len(right): torch.randn(512, len(right)) for right in rights.values()}

    def run(ids: Tensor, **options: object) -> Tensor:
        products = (inputs[len(right)][: ids.numel()] @ right for right in rights.values())
        return deque(products, maxlen=1)[0]

    return run


def lines(mark: str, times: Mapping[str, float]) -> Iterator[Figure]:
    """Milliseconds of each, and how ours compares."""
    for name, seconds in times.items():
        yield f"{mark}_{name}_cpu_ms", 1000 * seconds
    for mine in ("fused", "exact", "bf16", "pooled", "pooled_part"):
        for other in ("one_adapter", "naive_loop", "peft_arrow"):
            if other in times and mine in times:
                yield f"{mark}_{mine}_over_{other}", times[other] / times[mine]


def ratio(times: Mapping[str, Mapping[str, float]], phase: str, other: str) -> float:
    """How many times faster ours is."""
    return times[phase][other] / times[phase]["fused"]


def flips(mark: str, base: Any, shelf: Shelf) -> Iterator[Figure]:
    """Share of the selected adapters that are selected otherwise than by exact scores."""
    yield f"{mark}_flips_fused", flip(base, ours(base, shelf), shelf)
    yield f"{mark}_flips_bf16", flip(base, ours(base, shelf, torch.bfloat16), shelf)


def flip(base: Any, contestant: Contestant, shelf: Shelf) -> float:
    """Share of the exactly selected that a contestant does not select."""
    found = []
    for one in (ours(base, shelf, "exact"), contestant):
        with one.block() as composed, torch.no_grad():
            routed: Any = composed
            with record(routed) as trace:
                base(tokens(4, 128))
        found.append([trace[site].chosen() for site in trace.sites])
    changed = sum(int((a & ~b).sum()) for a, b in zip(found[0], found[1], strict=True))
    return changed / sum(int(chosen.sum()) for chosen in found[0])


def memory(size: Size) -> Iterator[Figure]:
    """Peaks of what one layer and the head hold, by those of the base."""
    base = llama(1, VOCABULARY)
    bodies = {"": base, "body_": base.model}
    alone = {part: peak(run) for part, run in bodies.items()}
    for case, count in ((QV, 32), (LINEAR, 100), (QV, 1000))[0 if size.full else 1 :]:
        shelf = Shelf.of(adapters(case, count, 1))
        field = contestants(base, shelf)
        for name in field if size.full else ("fused",):
            with field[name].block():
                for part, run in bodies.items():
                    yield f"{case.name}_E{count}_{name}_{part}memory_ratio", peak(run) / alone[part]


def peak(run: Any) -> float:
    """The most bytes that a pass over 4 × 128 tokens holds at once."""
    with torch.no_grad():
        run(tokens(4, 128), use_cache=False)
        with torch.profiler.profile(profile_memory=True) as profile:
            run(tokens(4, 128), use_cache=False)
    results: Any = profile.profiler
    events = [one for one in results.kineto_results.events() if one.name() == "[memory]"]
    held = torch.tensor([one.nbytes() for one in sorted(events, key=lambda one: one.start_ns())])
    return float(held.cumsum(0).max())


def many_files() -> Iterator[Figure]:
    """1000 adapters of one layer, read from 1000 folders; PEFT reads 100."""
    with tempfile.TemporaryDirectory() as folder:
        library = write_library(Path(folder), QV, 1000, 1)
        read_s, loaded = timed(lambda: list(read_library(library)))
        yield "files_E1000_load_read_cpu_s", read_s
        yield "files_E1000_load_spectra_cpu_s", timed(lambda: Shelf.of(loaded))[0]


def default_model() -> Iterator[Figure]:
    """The embedded default with the eight shipped adapters, all of its 30 layers."""
    base: Any = load_default(torch.float32)[0]
    library = [adapter.folder for adapter in default_library().adapters]
    shelf = Shelf.open(library)
    field = {
        "base": Contestant(base, nullcontext),
        "one_adapter": Contestant(
            one_adapter(load_default(torch.float32)[0], library[0]), nullcontext
        ),
        "fused": ours(base, shelf),
        "bf16": ours(base, shelf, torch.bfloat16),
        "pooled": ours(base, shelf, router=Pooled()),
    }
    for phase in PHASES:
        yield from lines(f"default_E8_{phase}", in_turn(field, phase, rounds=3, steps=8))
    yield from flips("default_E8", base, shelf)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    figures.run("spectr", __doc__, "fewer layers", lambda quick: measure(QUICK if quick else FULL))
