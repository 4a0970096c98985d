"""Does a chain pay? The paper's comparison with the arms it leaves out, on a small model.

Every arm sees the same batches in the same order, for each seed; the norm is the standard one, and
that of the paper's code (`once`). K routed experts of 32 per iteration and one shared one, width
64, four layers, hidden size 128, a constant learning rate after a warm-up, so that a loss after
fewer steps is that of a shorter training.

Prints `name: value` lines: `NORM_ARM_loss_STEPS`, nats per held-out token, mean over seeds;
`…_over_ARM`, its difference to the arm it is to be compared with, paired by seed, with `_low` and
`_high` of a 95 % t-interval; `…_same_time`, the same where both have run for as long as the
baseline did (in the baseline's seconds; losses between two evaluations are interpolated).

    python benchmarks/coe_quality.py --data ../shared/data --out runs/coe
                                     [--arms moe8 coe2_4 …] [--norms per_iteration once]
                                     [--seeds 3] [--steps 400] [--quick] [--save]

A run that was finished is read from its folder in --out; one that was killed goes on.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import coe_data
import figures
from scipy import stats

from expertmix.study.train_job import METRICS, run_train
from expertmix.study.train_metrics import read_metrics
from expertmix.study.train_settings import Data, New, TrainSettings

SIZE: dict[str, Any] = {
    "type": "coe", "tokenizer": "own", "vocab_size": 4096, "hidden_size": 128,
    "moe_intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_experts": 32, "num_experts_per_tok": 8, "num_iterations": 1, "n_shared_experts": 1,
    "max_position_embeddings": 256, "tie_word_embeddings": True, "output_router_logits": True,
}  # fmt: skip
CHAIN = {"num_iterations": 2, "num_experts_per_tok": 4}
ARMS: dict[str, tuple[dict[str, Any], str]] = {
    "moe8": ({}, ""),
    "coe2_4": (CHAIN, "moe8"),
    "coe2_4_shared_once": (CHAIN | {"shared_experts": "once"}, "moe8"),
    "moe8_shared2": ({"n_shared_experts": 2}, "moe8"),
    "moe8_deep": ({"num_hidden_layers": 8}, "moe8"),
    "coe2_4_24": (CHAIN | {"num_experts": 24}, "moe8"),
    "coe2_4_shared_gating": (CHAIN | {"gating": "shared"}, "coe2_4"),
    "coe2_4_fixed_gating": (CHAIN | {"gating": "fixed"}, "coe2_4"),
    "coe2_4_outer": (CHAIN | {"residual": "outer"}, "coe2_4"),
    "coe2_4_init": (CHAIN | {"residual": "init"}, "coe2_4"),
    "moe16": ({"num_experts_per_tok": 16}, "moe8"),
    "coe2_8": ({"num_iterations": 2}, "moe16"),
    "dense1": ({"num_experts": 8}, "moe8"),
    "dense2": ({"num_experts": 8, "num_iterations": 2}, "dense1"),
}
"""Name -> what is other than in MoE(8/32), and what it is compared with."""

Curve = list[tuple[int, float]]
"""Steps and held-out loss."""


def settings(
    options: argparse.Namespace, files: tuple[Path, Path], norm: str, arm: str, seed: int
) -> TrainSettings:
    """One run."""
    train, heldout = files
    return TrainSettings(
        model=New(new=SIZE | {"norm": norm} | ARMS[arm][0]),
        data=Data(train=(train,), validation=(heldout,)),
        out=options.out / f"{norm}-{arm}-{seed}",
        sequence_length=128, steps=options.steps, batch_size=16,
        learning_rate=options.learning_rate, schedule="constant", warmup=0.1, seed=seed,
        log_every=max(1, options.steps // 8),
        eval_every=max(1, options.steps // 4), save_every=max(1, options.steps // 4), keep=1,
        experts_implementation="expertmix", device="cpu",
    )  # fmt: skip


def trained(run: TrainSettings) -> tuple[Curve, float]:
    """The curve of a run, and its seconds per step."""
    run_train(run)
    lines = read_metrics(run.out / METRICS)
    curve = [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]
    rates = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    return curve, run.batch_size * run.sequence_length / statistics.median(rates)


def at(curve: Curve, step: float) -> float:
    """Loss after so many steps, on the line between two evaluations; nan beyond them."""
    for (first, before), (last, after) in itertools.pairwise(curve):
        if first <= step <= last:
            return before + (after - before) * (step - first) / (last - first)
    return math.nan


def compared(name: str, own: Sequence[float], others: Sequence[float]) -> figures.Figures:
    """Mean difference over seeds, with its t-interval."""
    found = [one - other for one, other in zip(own, others, strict=True)]
    mean = statistics.mean(found)
    yield name, mean
    if len(found) > 1:
        width = statistics.stdev(found) / math.sqrt(len(found))
        reach = float(stats.t.ppf(0.975, len(found) - 1)) * width
        yield f"{name}_low", mean - reach
        yield f"{name}_high", mean + reach


def measure(options: argparse.Namespace) -> Iterator[tuple[str, float]]:
    """All figures."""
    if options.quick:
        options.arms, options.norms, options.seeds, options.steps = (
            ["moe8", "coe2_4"],
            ["once"],
            1,
            8,
        )
    files = coe_data.write(options.data, options.out / "texts")
    for norm in options.norms:
        curves: dict[str, list[Curve]] = {}
        seconds: dict[str, float] = {}
        for arm in options.arms:
            runs = [
                trained(settings(options, files, norm, arm, seed)) for seed in range(options.seeds)
            ]
            curves[arm] = [curve for curve, _ in runs]
            seconds[arm] = statistics.median(second for _, second in runs)
            yield from shown(f"{norm}_{arm}", ARMS[arm][1], arm, curves, seconds)


def shown(
    name: str, rival: str, arm: str, curves: dict[str, list[Curve]], seconds: dict[str, float]
) -> figures.Figures:
    """The lines of an arm."""
    yield f"{name}_seconds_per_step", seconds[arm]
    for number, (steps, _) in enumerate(curves[arm][0]):
        own = [curve[number][1] for curve in curves[arm]]
        yield f"{name}_loss_{steps}", statistics.mean(own)
        if rival in curves:
            others = [curve[number][1] for curve in curves[rival]]
            yield from compared(f"{name}_over_{rival}_{steps}", own, others)
    if rival in curves:
        ratio = seconds[arm] / seconds[rival]
        end = curves[arm][0][-1][0]
        mine, theirs = (end, end * ratio) if ratio < 1 else (end / ratio, end)
        own = [at(curve, mine) for curve in curves[arm]]
        others = [at(curve, theirs) for curve in curves[rival]]
        yield from compared(f"{name}_over_{rival}_same_time", own, others)


if __name__ == "__main__":
    parser = figures.parser(__doc__, "two arms, eight steps")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("runs/coe"))
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument(
        "--norms", nargs="+", choices=("per_iteration", "once"), default=["per_iteration", "once"]
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    run: Callable[[argparse.Namespace], figures.Figures] = measure
    figures.show("coe_quality", parser.parse_args(), run)
