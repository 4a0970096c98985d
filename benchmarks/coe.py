"""Chain-of-Experts against a plain MoE, and the implementation `expertmix` against transformers'.

A layer is norm, router and experts (64 of them). CoE-2(4/64) runs two iterations of top 4,
MoE(8/64) one of top 8, so both have the same products of experts. The CoE runs on `expertmix`; the
MoE on whichever of transformers' implementations is fastest in that case (eager, batched_mm where
there are few tokens, grouped_mm; for training grouped_mm), all measured in turn, in process CPU
time on one thread. `*_over_*` are medians of ratios round by round. Calls have different tokens, so
that experts have other numbers of rows every time: torch's 16-bit products pay for new numbers.

- `forward_over_moe_T`, `train_over_moe_T`: CoE over the best MoE, T tokens; `_bf16` in bfloat16;
  `_1024` at hidden 1024 and width 512, not 512 and 256.
- `forward_over_floor_T`: CoE over the larger of FLOPs / `matrix_gflop_per_s` and bytes of weights /
  `memory_gb_per_s`; experts that no token calls are not counted.
- `speedup_over_transformers_decode`, `_prefill`, `_train`: the MoE itself, transformers' default
  (grouped_mm) over `expertmix`, at 1, 4096 and 4096 tokens; `_best` over their fastest.
- `deferred_speedup_T`: training the CoE with a gradient of experts per iteration, over with one.
- `train_peak_over_moe_4096`: memory that a step adds, over that of MoE on grouped_mm.
- `train_tokens_per_s`: of the 20M language model (4 layers of 256, 32 experts of 176, CoE-2(4/32)),
  with AdamW, per CPU second; `train_tokens_over_moe` over MoE(8/32) on grouped_mm.

    python benchmarks/coe.py [--quick] [--save]
"""

from __future__ import annotations

import re
import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import figures
import torch
from torch import Tensor, nn
from turns import timed

from expertmix.experts.chain import Chain
from expertmix.experts.products import register_products
from expertmix.models.coe import CoeConfig, CoeForCausalLM
from expertmix.models.coe.modeling_coe import CoeExperts

Figure = tuple[str, float]
Times = dict[str, list[float]]
EXPERTS, CALLS = 64, 8  # top K over all iterations
FEW = 16  # tokens up to which batched_mm, which copies weights, has a chance


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        hidden: Hidden size; experts are half as wide.
        dtype: Of everything.
        tokens: Of a call.
        rounds: In how many turns.
    """

    hidden: int
    dtype: torch.dtype
    tokens: int
    rounds: int

    @property
    def marks(self) -> str:
        """What a figure's name ends with."""
        wide = f"_{self.hidden}" if self.hidden != 512 else ""
        return f"{self.tokens}{wide}{'_bf16' if self.dtype == torch.bfloat16 else ''}"


def measure(quick: bool) -> Iterator[Figure]:
    """All figures, in the order in which they are printed."""
    register_products()
    for hidden in (512,) if quick else (512, 1024):
        for dtype in (torch.float32, torch.bfloat16):
            machine = Machine.measured(dtype)
            name = "_bf16" if dtype == torch.bfloat16 else ""
            yield f"matrix_gflop_per_s{name}", machine.flops / 1e9
            yield f"memory_gb_per_s{name}", machine.bytes / 1e9
            for tokens, rounds in ((1, 40), (128, 6), (4096, 2)):
                yield from layer(
                    Case(hidden, dtype, tokens, rounds if quick else 3 * rounds), machine
                )
    yield from language_model(2 if quick else 9)


@dataclass(frozen=True)
class Machine:
    """What one thread can do.

    Attributes:
        flops: Per second, of a large product.
        bytes: Per second, read from memory.
    """

    flops: float
    bytes: float

    @classmethod
    def measured(cls, dtype: torch.dtype) -> Machine:
        """In this process, now; the best of some runs."""
        square = torch.randn(2048, 2048).to(dtype)
        product = min(timed(lambda: square @ square)[0] for _ in range(5))
        tall, row = torch.ones(2**14, 2**12, dtype=dtype), torch.ones(2**12, dtype=dtype)
        reading = min(timed(lambda: tall.mv(row))[0] for _ in range(5))
        return cls(2 * 2048**3 / product, tall.nbytes / reading)


def layer(case: Case, machine: Machine) -> Iterator[Figure]:
    """Both layers, forward and, with many tokens, training."""
    coe, moe = chain(case, 2), chain(case, 1)
    implementations = ["eager", "grouped_mm", *["batched_mm"] * (case.tokens <= FEW)]
    forward = {"coe": passing(case, coe, "expertmix"), "mine": passing(case, moe, "expertmix")}
    forward |= {name: passing(case, moe, name) for name in implementations}
    times = in_turn(forward, case.rounds)
    best = min(implementations, key=lambda name: statistics.median(times[name]))
    yield f"forward_over_moe_{case.marks}", ratio(times["coe"], times[best])
    yield f"forward_over_floor_{case.marks}", statistics.median(times["coe"]) / floor(case, machine)
    yield from speedups(times, best, case, "decode" if case.tokens == 1 else "prefill")
    if case.tokens == 1:
        return
    train = {
        "coe": training(case, coe, "expertmix"),
        "apart": training(case, coe, "expertmix", coe._run),
        "mine": training(case, moe, "expertmix"),
        "grouped_mm": training(case, moe, "grouped_mm"),
    }
    times = in_turn(train, case.rounds)  # eager writes a dense gradient per expert: out of the race
    yield f"train_over_moe_{case.marks}", ratio(times["coe"], times["grouped_mm"])
    yield f"deferred_speedup_{case.marks}", ratio(times["apart"], times["coe"])
    yield from speedups(times, "grouped_mm", case, "train")
    if case.tokens == 4096:
        peaks = [peak(train[name]) for name in ("coe", "grouped_mm")]
        yield f"train_peak_mb_{case.marks}", peaks[0] / 1e6
        yield f"train_peak_over_moe_{case.marks}", peaks[0] / peaks[1]


def speedups(times: Times, best: str, case: Case, phase: str) -> Iterator[Figure]:
    """Of the MoE on `expertmix`, over transformers' default and over the best of transformers'."""
    name = f"speedup_over_transformers_{phase}" + case.marks.removeprefix(str(case.tokens))
    if case.tokens == 128:
        name = name.replace(phase, f"{phase}_128")
    yield name, ratio(times["grouped_mm"], times["mine"])
    if best != "grouped_mm":
        yield f"{name}_best", ratio(times[best], times["mine"])


def chain(case: Case, iterations: int) -> Chain:
    """A layer with top K divided among iterations."""
    config = CoeConfig(
        hidden_size=case.hidden, moe_intermediate_size=case.hidden // 2, num_experts=EXPERTS,
        num_experts_per_tok=CALLS // iterations, num_iterations=iterations,
    )  # fmt: skip
    torch.manual_seed(0)
    made = Chain(config, CoeExperts(config))
    for parameter in made.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=case.hidden**-0.5)
    return made.to(case.dtype)


def texts(case: Case) -> list[Tensor]:
    """Inputs of one call after the other."""
    make = torch.Generator().manual_seed(1)
    count = 32 if case.tokens <= 128 else 6
    return [
        torch.randn(case.tokens, case.hidden, generator=make).to(case.dtype) for _ in range(count)
    ]


def passing(case: Case, layer: Chain, implementation: str) -> Callable[[int], None]:
    """A forward pass in turn number so and so."""
    inputs, config = texts(case), layer.config

    def run(turn: int) -> None:
        config._experts_implementation = implementation  # type: ignore[attr-defined]
        with torch.no_grad():
            layer(inputs[turn % len(inputs)])

    return run


def training(
    case: Case, layer: Chain, implementation: str, forward: Callable[[Tensor], Tensor] | None = None
) -> Callable[[int], None]:
    """Forward and backward in turn number so and so."""
    inputs, config = texts(case), layer.config

    def run(turn: int) -> None:
        config._experts_implementation = implementation  # type: ignore[attr-defined]
        layer.zero_grad()
        hidden = inputs[turn % len(inputs)].clone().requires_grad_()
        (forward or layer)(hidden).sum().backward()
        layer.zero_grad()

    return run


def in_turn(field: Mapping[str, Callable[[int], None]], rounds: int) -> Times:
    """CPU seconds of each contestant in each round, after one that warms up."""
    times: Times = {name: [] for name in field}
    for turn in range(rounds + 1):
        for name, run in field.items():
            times[name].append(timed(lambda run=run, turn=turn: run(turn))[0])  # type: ignore[misc]
    return {name: found[1:] for name, found in times.items()}


def ratio(one: list[float], other: list[float]) -> float:
    """Median over rounds."""
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


def floor(case: Case, machine: Machine) -> float:
    """Seconds that the experts of a CoE must take: in each iteration, products or reading."""
    iterations, top_k = 2, CALLS // 2
    expert = 3 * case.hidden * case.hidden // 2
    called = EXPERTS * (1 - (1 - top_k / EXPERTS) ** case.tokens)  # expected, of even routing
    products = 2 * case.tokens * top_k * expert / machine.flops
    reading = called * expert * case.dtype.itemsize / machine.bytes
    return iterations * max(products, reading)


def peak(run: Callable[[int], None]) -> float:
    """Bytes that a call adds to what the process holds, at their highest; NaN outside of Linux."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return float("nan")
    reset.write_text("5")
    before = _kilobytes("VmRSS", status)
    run(0)
    return 1024 * (_kilobytes("VmHWM", status) - before)


def _kilobytes(key: str, status: Path) -> float:
    found = re.search(rf"{key}:\s+(\d+)", status.read_text())
    assert found is not None
    return float(found[1])


def language_model(rounds: int) -> Iterator[Figure]:
    """A training step of the 20M model on 4 texts of 256 tokens."""
    field = {
        name: step(iterations, implementation)
        for name, iterations, implementation in (("coe", 2, "expertmix"), ("moe", 1, "grouped_mm"))
    }
    times = in_turn(field, rounds)
    yield "train_tokens_per_s", 4 * 256 / statistics.median(times["coe"])
    yield "train_tokens_over_moe", ratio(times["moe"], times["coe"])


def step(iterations: int, implementation: str) -> Callable[[int], None]:
    """Of AdamW."""
    torch.manual_seed(0)
    config = CoeConfig(
        vocab_size=4096, hidden_size=256, moe_intermediate_size=176, num_hidden_layers=4,
        num_attention_heads=4, num_experts=32, num_experts_per_tok=CALLS // iterations,
        num_iterations=iterations,
    )  # fmt: skip
    model: Any = CoeForCausalLM(config)
    model.set_experts_implementation(implementation)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(0, 4096, (4, 256), generator=torch.Generator().manual_seed(2))

    def run(turn: int) -> None:
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()

    return run


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    figures.run("coe", __doc__, "hidden 512 only, a third of the rounds", measure)
