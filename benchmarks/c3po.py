"""What re-mixing costs: a whole NGD, a whole kernel regression, and one step by suffix or in full.

Prints `name: value` lines: 16 test samples of about 100 tokens with four options, references with
states, k = 3 neighbors, 10 steps, the last five layers, 20 core experts; on a random MoE of OLMoE's
shape (453M, top-8 of 64, 16 layers), or on the default MoE. Times are process CPU time on one
thread; what is divided was measured in turn in one process, so that a loaded machine blurs both
sides alike. Ratios are medians of pairs.

The base is one plain pass over the same samples with the logits that decide and no others: padded
on the left and only the last column's, where options are letters (one token each); where options
are texts (`--answers text`), one row per option and the logits of its tokens. `ngd_total` is
`remix`: a plain pass that keeps what is needed, neighbors, 10 steps and the loss after the last
one, and the evaluation with all core experts and with the router's own top K.

The floor, in multiply-adds. H hidden, F expert width, K of E experts, C core ones, V words, S
tokens of a text, a = weights of the attention's maps, e = 3HF those of an expert, Q width of all
heads. A token costs a + K·e + H·E + S·Q in each of N layers, so the base of B samples is

    B·S·N·(a + K·e + H·E + S·Q) + B·H·V

A step has R = k·B probes, with one token each that is computed again. In the first critical layer
nothing that enters the experts ever changes, and weighing their outputs costs nothing. The other
L − 1 layers cost a + C·e, attention to S keys twice Q·S, and as much again, with 4·Q·S, for the
gradient in what enters them (weights want none); the head costs H·V each way:

    R·((L − 1)·(2·(a + C·e) + 6·S·Q) + 2·H·V)

For 453M this is 10 GFLOP beside the base's 219: ten steps and the evaluations, each a fraction of a
step, add about a half (`ngd_floor_over_base`). That counts a multiply-add of a step like one of the
base, though 48 tokens times 20 experts are 15 rows per expert, where weights stream from memory
(250 MB of experts each way and step) and a product runs at half its rate. `ngd_share_of_floor` is
base time × `ngd_floor_over_base` / measured.

    python benchmarks/c3po.py [--quick] [--save] [--model default-moe] [--answers text]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import figures
import torch
from record import olmoe
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from expertmix.bindings.pathways import open_pathways
from expertmix.bindings.transformers import TransformersMoE
from expertmix.bindings.whole import Whole
from expertmix.core.pathway import Question
from expertmix.models.default import default_moe_path
from expertmix.optimize.descent import NGD
from expertmix.optimize.neighbors import Finder, Neighbors
from expertmix.optimize.problem import Method, Problem
from expertmix.optimize.reference import ReferenceSet
from expertmix.optimize.regression import KernelRegression
from expertmix.optimize.remix import remix
from expertmix.optimize.samples import Sample
from expertmix.optimize.start import start
from expertmix.optimize.surrogate import Surrogate

Figure = tuple[str, float]
SAMPLES, STEPS, CORE, LAYERS = 16, 10, 20, 5
NEIGHBORS = Neighbors(k=3, max_similarity=None, ngram=None)  # random texts: nothing to leave out
LETTERS = ((11,), (12,), (13,), (14,))


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    rounds: int
    references: int
    crowd: int


QUICK, FULL = Size(1, 24, 20_000), Size(5, 96, 100_000)


def measure(options: argparse.Namespace) -> Iterator[Figure]:
    """All figures, in the order in which they are printed."""
    size = QUICK if options.quick else FULL
    model: Any = load_moe() if options.model == "default-moe" else olmoe()
    model.eval()
    yield "parameters_millions", sum(p.numel() for p in model.parameters()) / 1e6
    with open_pathways(model, layers=f"last {LAYERS}") as pathways:
        assert pathways.exact, pathways.notice
        solved = right(pathways, questions(size.references, 1, options.answers, model))
        seconds, reference = timed(lambda: ReferenceSet.build(pathways, solved))
        yield from building(reference, seconds)
        asked = right(pathways, questions(SAMPLES, 2, options.answers, model))
        yield from totals(model, pathways, asked, reference, size)
    yield from stepping(model, pathways, asked, reference, size)
    yield from searching(reference, size)


def load_moe() -> nn.Module:
    """The embedded default, upcycled with the shipped adapters."""
    model: nn.Module = AutoModelForCausalLM.from_pretrained(default_moe_path(), dtype=torch.float32)
    return model


def questions(count: int, seed: int, answers: str, model: Any) -> list[Question]:
    """Random prompts of 90 to 110 tokens; options are four letters, or texts of 2 to 8 tokens."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> tuple[int, ...]:
        length = int(torch.randint(low, high + 1, (1,), generator=generator))
        return tuple(torch.randint(20, 30000, (length,), generator=generator).tolist())

    return [
        Question(
            draw(90, 110), LETTERS if answers == "letters" else tuple(draw(2, 8) for _ in "4444")
        )
        for _ in range(count)
    ]


def right(pathways: Any, asked: list[Question]) -> list[Sample]:
    """Samples whose gold option is what the model answers."""
    readings = [
        one for at in range(0, len(asked), 16) for one in pathways.read(asked[at : at + 16])
    ]
    return [
        Sample(question, int(reading.logprobs.sum(-1).argmax()), name=str(number))
        for number, (question, reading) in enumerate(zip(asked, readings, strict=True))
    ]


def building(reference: ReferenceSet, seconds: float) -> Iterator[Figure]:
    """Time and disk of 10 000 references of this length, scaled up from fewer (`measured_on`)."""
    yield "reference_measured_on", len(reference)
    yield "reference_build_seconds_10k", seconds * 10_000 / len(reference)
    with tempfile.TemporaryDirectory() as folder:
        reference.save(Path(folder) / "set")
        size = sum(file.stat().st_size for file in (Path(folder) / "set").iterdir())
    yield "reference_megabytes_10k", size / 1e6 * 10_000 / len(reference)


def totals(
    model: Any, pathways: Any, asked: list[Sample], reference: ReferenceSet, size: Size
) -> Iterator[Figure]:
    """Whole runs over the plain pass, and where the time goes."""
    methods: dict[str, Method] = {
        "ngd": NGD(steps=STEPS, core=core_of(pathways)),
        "kernel_regression": KernelRegression(),
    }
    plain = base_pass(model, asked)
    plain()
    times: dict[str, list[float]] = {name: [] for name in ("base", "read", *methods)}
    stages: dict[str, dict[str, float]] = {}
    for turn in range(size.rounds + 1):  # the first one warms up
        times["base"].append(timed(plain)[0])
        texts = [one.question for one in asked]
        times["read"].append(timed(partial(pathways.read, texts))[0])
        for name, method in methods.items():
            again = partial(remix, pathways, asked, reference, method, neighbors=NEIGHBORS)
            taken, found = timed(again)
            assert turn or all(one.changed for one in found.outcomes) or name != "ngd"
            times[name].append(taken)
            stages[name] = dict(found.seconds)
    base = statistics.median(times["base"][1:])
    yield "base_cpu_s", base
    yield "read_over_base", ratio(times["read"], times["base"])
    for name in methods:
        yield f"{name}_total_over_base", ratio(times[name], times["base"])
    for name in methods:
        whole = sum(stages[name].values())
        for stage, seconds in stages[name].items():
            yield f"{name}_share_{stage}", seconds / whole
    if not letters(asked):
        return
    floor = Floor.of(model, asked, core_of(pathways))
    yield "base_gflop", 2 * floor.base / 1e9
    yield "step_gflop", 2 * floor.step / 1e9
    yield "base_gflop_per_s", 2 * floor.base / 1e9 / base
    yield "ngd_floor_over_base", floor.ngd / floor.base
    yield "ngd_share_of_floor", floor.ngd / floor.base / ratio(times["ngd"], times["base"])


def base_pass(model: Any, asked: list[Sample]) -> Callable[[], Tensor]:
    """The scores by one plain pass over padded rows, prepared."""
    texts = [one.question for one in asked]
    rows = [one.prompt + option[:-1] for one in texts for option in one.options]
    if letters(asked):
        rows = [one.prompt for one in texts]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows])
    real = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    place = (real.cumsum(1) - 1).clamp(min=0)
    keep = 1 if letters(asked) else max(len(option) for one in texts for option in one.options)

    def run() -> Tensor:
        with torch.no_grad():
            output = model(
                input_ids=ids, attention_mask=real, position_ids=place, use_cache=False,
                logits_to_keep=keep,
            )  # fmt: skip
            scores: Tensor = output.logits.log_softmax(-1)
            return scores

    return run


def letters(asked: list[Sample]) -> bool:
    """Whether all options are of one token."""
    return all(len(option) == 1 for one in asked for option in one.question.options)


def stepping(
    model: Any, pathways: Any, asked: list[Sample], reference: ReferenceSet, size: Size
) -> Iterator[Figure]:
    """One NGD step (losses and gradients of all probes) by suffix and by full passes."""
    with pathways.running():
        problem = problem_of(pathways, asked, reference)
    whole = Whole(TransformersMoE(model), pathways.sites)
    method = NGD(steps=1, core=core_of(pathways))
    short, full = method.surrogate(problem), method.surrogate(replace(problem, pathways=whole))
    best = problem.start.topk(core_of(pathways), dim=-1).indices
    inside = torch.zeros_like(problem.start, dtype=torch.bool).scatter(-1, best, True)
    values = problem.start.where(inside, float("-inf"))

    def step(surrogate: Surrogate) -> Callable[[], tuple[Tensor, Tensor]]:
        return lambda: surrogate.gradient(values)

    with pathways.running():
        step(short)()  # makes its batches
    repeats = 2 if size is QUICK else 8
    fast, slow, errors = [], [], []
    for _ in range(1 if size is QUICK else 3):
        with pathways.running():
            taken, results = timed(lambda: [step(short)() for _ in range(repeats)])
        fast.append(taken / repeats)
        with whole.running():
            taken, exact = timed(step(full))
        slow.append(taken)
        pairs = zip(results[-1], exact, strict=True)
        errors.append([float((one - other).abs().max()) for one, other in pairs])
    yield "suffix_step_cpu_s", statistics.median(fast)
    yield "suffix_step_speedup", statistics.median(b / a for a, b in zip(fast, slow, strict=True))
    yield "suffix_max_abs_error", max(one[0] for one in errors)
    yield "suffix_max_abs_error_gradient", max(one[1] for one in errors)
    if letters(asked):
        floor = Floor.of(model, asked, core_of(pathways))
        yield "step_gflop_per_s", 2 * floor.step / 1e9 / statistics.median(fast)
    yield "matrix_gflop_per_s", matrix_rate()


def problem_of(pathways: Any, asked: list[Sample], reference: ReferenceSet) -> Problem:
    """Test samples with all that is known before a step."""
    readings = pathways.read([one.question for one in asked])
    values, mass = start(readings, pathways.sites)
    finder = Finder(reference, NEIGHBORS)
    found = finder.find(reference.embed(readings), asked)
    return Problem(pathways, asked, readings, values, mass, found, finder)


def searching(reference: ReferenceSet, size: Size) -> Iterator[Figure]:
    """Exact neighbors among many references, of 16 queries at a time, per query."""
    width = reference.embeddings.shape[1]
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(size.crowd, width, generator=generator)
    picked = [number % len(reference) for number in range(size.crowd)]
    crowd = replace(reference.subset(picked), embeddings=rows)
    queries = torch.randn(16, width, generator=generator)
    setup, finder = timed(lambda: Finder(crowd, Neighbors(k=3, ngram=None)))
    finder.find(queries)
    yield f"neighbor_setup_s_{size.crowd // 1000}k", setup
    found = [timed(lambda: finder.find(queries))[0] for _ in range(5)]
    yield f"neighbor_ms_{size.crowd // 1000}k", 1000 * statistics.median(found) / 16
    alone = [timed(lambda: finder.find(queries[:1]))[0] for _ in range(5)]
    yield f"neighbor_alone_ms_{size.crowd // 1000}k", 1000 * statistics.median(alone)


@dataclass(frozen=True)
class Floor:
    """Multiply-adds, as counted above.

    Attributes:
        base: Of the plain pass.
        step: Of one step.
        ngd: Of a plain pass, all steps, the last loss and both evaluations.
    """

    base: float
    step: float
    ngd: float

    @classmethod
    def of(cls, model: Any, asked: list[Sample], core: int) -> Floor:
        """Of a model with these samples; options of one token."""
        c = model.config
        H, V, N, K = c.hidden_size, c.vocab_size, c.num_hidden_layers, c.num_experts_per_tok
        E = getattr(c, "num_experts", None) or c.num_local_experts
        head = getattr(c, "head_dim", None) or H // c.num_attention_heads
        Q = head * c.num_attention_heads
        a = 2 * H * Q + 2 * H * head * c.num_key_value_heads
        e = 3 * H * c.intermediate_size
        S = statistics.mean(len(one.question.prompt) for one in asked)
        B, L = len(asked), min(LAYERS, N)
        R = NEIGHBORS.k * B
        base = B * S * N * (a + K * e + H * E + S * Q) + B * H * V

        def forward(experts: int) -> float:
            passed: float = (L - 1) * (a + experts * e + 2 * S * Q) + H * V
            return passed

        step = R * ((L - 1) * (2 * (a + core * e) + 6 * S * Q) + 2 * H * V)
        rest = R * forward(core) + B * (forward(core) + forward(K))
        return cls(base, step, base + STEPS * step + rest)


def core_of(pathways: Any) -> int:
    """Core experts: 20, or all where there are fewer."""
    experts: int = pathways.sites[0].num_experts
    return min(CORE, experts)


def matrix_rate() -> float:
    """GFLOP per second of a large product."""
    one = torch.randn(1024, 1024)
    found = [timed(lambda: one @ one)[0] for _ in range(9)]
    return 2 * 1024**3 / 1e9 / min(found)


def ratio(mine: list[float], other: list[float]) -> float:
    """Median over rounds; the first one is left out."""
    return statistics.median(a / b for a, b in zip(mine[1:], other[1:], strict=True))


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of this process, and what came out."""
    begin = time.process_time()
    result = run()
    return time.process_time() - begin, result


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    parser = figures.parser(__doc__, "one round, fewer references")
    parser.add_argument("--model", choices=["olmoe", "default-moe"], default="olmoe")
    parser.add_argument("--answers", choices=["letters", "text"], default="letters")
    given = parser.parse_args()
    marks = [given.model.replace("-", "_")] * (given.model != "olmoe")
    figures.show("_".join(["c3po", *marks, *["text"] * (given.answers == "text")]), given, measure)
