"""C3PO on text: the default MoE with routers that are known to be wrong, and as it is.

In the last five layers the rows of each router are permuted (`permuted`), or noise is added to them
(`noisy`), so better routing is known to exist: the undamaged router's. `none` leaves them as they
are: can the routing of a text still be better where its domain has an expert? A text of one of
eight domains is a prompt of 96 tokens and 32 tokens that follow; references are training texts of
the same domains. All scored tokens are decision tokens, and share one shift of the routers' logits.

Prints `name: value` lines: `loss` in nats per token with the router's own top K; `change`, what it
is above that without re-mixing; `recovered`, the share (damaged − method) / (damaged − intact) of
the damage that a method undoes; `_low` and `_high` are a 95 % interval of a paired bootstrap over
texts; `moved`, the share of the texts whose routing was changed at all.

    python benchmarks/c3po_texts.py --data ../shared/data [--damage permuted noisy none]
                                    [--methods ngd random …] [--domains maths …]
                                    [--quick] [--save]

While methods were built, the first four blocks of each domain's held-out text were looked at; these
figures come from the blocks after the 80th.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import figures
import quality_data as texts
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from expertmix.bindings.pathways import open_pathways
from expertmix.core.pathway import Pathways, Question
from expertmix.models.default import default_moe_path
from expertmix.optimize.context import ContextLoss
from expertmix.optimize.descent import NGD
from expertmix.optimize.global_delta import GlobalDelta
from expertmix.optimize.leave_one_out import LeaveOneOut
from expertmix.optimize.mode_finding import ModeFinding
from expertmix.optimize.neighbors import NEAREST, Neighbors
from expertmix.optimize.oracle import Oracle
from expertmix.optimize.problem import Method
from expertmix.optimize.reference import ReferenceSet
from expertmix.optimize.regression import KernelRegression
from expertmix.optimize.remix import remix
from expertmix.optimize.samples import Sample
from expertmix.study.bootstrap import Draws, estimate, ratio

PROMPT = 96
LAYERS = 5
SHIFT = NGD(parameter="add", lr=1.0, core=None)
Contestant = tuple[Method, Neighbors, str]  # method, who is a neighbor, which references

METHODS: dict[str, Contestant] = {
    "ngd": (SHIFT, NEAREST, "true"),
    "ngd_small_steps": (replace(SHIFT, lr=0.3), NEAREST, "true"),
    "ngd_leave_one_out": (LeaveOneOut(SHIFT), NEAREST, "true"),
    "ngd_set": (replace(SHIFT, parameter="set"), NEAREST, "true"),
    "kernel_regression": (KernelRegression(), NEAREST, "true"),
    "mode_finding": (ModeFinding(), NEAREST, "true"),
    "context": (ContextLoss(SHIFT), NEAREST, "true"),
    "global_delta": (GlobalDelta(SHIFT), NEAREST, "true"),
    "random": (SHIFT, Neighbors(order="random"), "true"),
    "shuffled": (SHIFT, NEAREST, "shuffled"),
    "oracle": (Oracle(SHIFT), NEAREST, "true"),
}
"""What is compared; `random`, `shuffled` are controls and `oracle` a bound."""


def sample(ids: Sequence[int], name: str, answer: Sequence[int] | None = None) -> Sample:
    """A text as a prompt and the one answer."""
    after = tuple(ids[PROMPT:] if answer is None else answer)
    return Sample(Question(tuple(ids[:PROMPT]), (after,)), 0, (float(len(after)),), name)


def tests(data: Path, tokenizer: Any, domains: Sequence[str], count: int) -> list[Sample]:
    """So many held-out texts of each domain."""
    return [
        sample(ids, f"{name} {number}")
        for name in domains
        for number, ids in enumerate(texts.blocks(data, tokenizer, name, texts.FIRST, count))
    ]


def references(data: Path, tokenizer: Any, count: int, *, shuffled: bool) -> list[Sample]:
    """So many training texts of each domain; shuffled, each with the end of another text."""
    found = [
        (f"{name} training {number}", ids)
        for name in texts.NAMES
        for number, ids in enumerate(texts.training_blocks(data, tokenizer, name, count))
    ]
    ends = [ids[PROMPT:] for _, ids in found]
    if shuffled:
        random.Random(0).shuffle(ends)
    return [sample(ids, name, end) for (name, ids), end in zip(found, ends, strict=True)]


@contextmanager
def damaged(model: Any, kind: str, seed: int = 0) -> Iterator[None]:
    """Wrong routers in the last layers, for the length of the block."""
    draw = torch.Generator().manual_seed(seed)
    routers = [layer.mlp.gate for layer in model.model.layers[-LAYERS:]]
    kept = [router.weight.detach().clone() for router in routers]
    try:
        for router, own in zip(routers, kept, strict=True):
            router.weight.data = wrong(own, kind, draw)
        yield
    finally:
        for router, own in zip(routers, kept, strict=True):
            router.weight.data = own


def wrong(weight_EH: torch.Tensor, kind: str, draw: torch.Generator) -> torch.Tensor:
    """A router's rows in another order, or with noise as large as they are."""
    if kind == "none":
        return weight_EH
    if kind == "permuted":
        return weight_EH[torch.randperm(len(weight_EH), generator=draw)]
    noise = torch.randn(weight_EH.shape, generator=draw)
    scale = weight_EH.float().norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True)
    moved: torch.Tensor = weight_EH + (noise * scale).to(weight_EH)
    return moved


def losses(pathways: Pathways, samples: Sequence[Sample]) -> list[float]:
    """Nats per token of a plain pass."""
    found: list[float] = []
    for at in range(0, len(samples), 8):
        part = samples[at : at + 8]
        readings = pathways.read([one.question for one in part])
        found += [
            -float(reading.logprobs.sum()) / one.units[0]
            for reading, one in zip(readings, part, strict=True)
        ]
    return found


def measure(options: argparse.Namespace) -> figures.Figures:
    """All figures."""
    tokenizer = AutoTokenizer.from_pretrained(default_moe_path())
    model: Any = AutoModelForCausalLM.from_pretrained(
        default_moe_path(), dtype=getattr(torch, options.dtype)
    )
    count, known = (1, 4) if options.quick else (options.tests, options.references)
    asked = tests(options.data, tokenizer, options.domains, count)
    answered = {
        kind: references(options.data, tokenizer, known, shuffled=kind == "shuffled")
        for kind in {METHODS[name][2] for name in options.methods}
    }
    yield "texts", len(asked)
    yield "references", len(next(iter(answered.values())))
    with open_pathways(model, layers=f"last {LAYERS}", scored=True) as pathways:
        intact = losses(pathways, asked)
    for kind in options.damage:
        with (
            damaged(model, kind),
            open_pathways(model, layers=f"last {LAYERS}", scored=True, shift=True) as pathways,
        ):
            yield from contest(kind, pathways, asked, answered, intact, options.methods)


def contest(
    kind: str,
    pathways: Pathways,
    asked: Sequence[Sample],
    answered: dict[str, list[Sample]],
    intact: Sequence[float],
    methods: Sequence[str],
) -> figures.Figures:
    """All methods under one damage."""
    sets = {name: ReferenceSet.build(pathways, rows) for name, rows in answered.items()}
    broken = losses(pathways, asked)
    yield f"{kind}_intact_loss", sum(intact) / len(intact)
    yield f"{kind}_damaged_loss", sum(broken) / len(broken)
    for name in methods:
        method, neighbors, reference = METHODS[name]
        found = remix(pathways, asked, sets[reference], method, neighbors=neighbors, batch_size=8)
        hard = [-float(one.hard[0]) for one in found.outcomes]
        undone = [before - after for before, after in zip(broken, hard, strict=True)]
        gap = [before - after for before, after in zip(broken, intact, strict=True)]
        yield f"{kind}_{name}_loss", sum(hard) / len(hard)
        yield from interval(f"{kind}_{name}_change", undone, [-1.0] * len(undone))
        if kind != "none":
            yield from interval(f"{kind}_{name}_recovered", undone, gap)
        changed = sum(one.changed for one in found.outcomes)
        yield f"{kind}_{name}_moved", changed / len(found.outcomes)
        yield f"{kind}_{name}_seconds_per_text", sum(found.seconds.values()) / len(gap)


def interval(name: str, top: Sequence[float], bottom: Sequence[float]) -> figures.Figures:
    """A quotient of sums over texts, with the interval of a bootstrap over texts."""
    share = estimate(ratio(*Draws(len(top)).sums(top, bottom)), len(top))
    yield name, share.value
    yield f"{name}_low", share.low
    yield f"{name}_high", share.high


if __name__ == "__main__":
    parser = figures.parser(__doc__, "one text of each domain and one damage")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument(
        "--damage", nargs="+", choices=("permuted", "noisy", "none"), default=["permuted"]
    )
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument(
        "--domains", nargs="+", choices=texts.NAMES, default=texts.NAMES, help="of the texts asked"
    )
    parser.add_argument("--tests", type=int, default=6, help="texts of each domain")
    parser.add_argument("--references", type=int, default=20, help="of each domain")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    run: Callable[[argparse.Namespace], figures.Figures] = measure
    options = parser.parse_args()
    figures.show("_".join(["c3po_texts", *options.damage]), options, run)
