"""How well adapters are chosen: every router on the shipped library, on text nobody trained on.

Prints `name: value` lines; `_low` and `_high` are a 95 % interval of a paired bootstrap over texts.
`loss` is nats per token, `recovered` the share of the oracle's gain over the base; `token`, `text`
and `site` say how often a token, a text, a token at a single module goes to the adapter of its own
domain (chance: 1 / adapters).

    python benchmarks/spectr_quality.py --data ../shared/data [--parts domains tasks …]
                                        [--variants DIR] [--quick] [--save]

Parts: `domains` (eight domains, all contestants), `mixtures` (two domains in one text), `unseen`
(domains of no adapter), `size` (near-duplicates and random adapters on the shelf), `rank` (two
experts at other ranks: needs --variants, made by examples/train_experts.py --ranks), `tasks`
(choice questions). While routers were built, the first 60 blocks of each domain's held-out text
were looked at; these figures come from the blocks after the 80th.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import figures
import quality_data as texts
import rivals
import torch
from quality_data import NAMES

from expertmix.core.estimate import Estimate
from expertmix.core.record import record
from expertmix.experts.compose import ready
from expertmix.experts.composed import Composed
from expertmix.experts.fitting import calibrate, fit_ridge
from expertmix.experts.lora import Adapter
from expertmix.experts.own_text import own_text
from expertmix.experts.peft_folder import read_adapter, read_library
from expertmix.experts.shelf import Shelf
from expertmix.models.default import ASSETS, load_default
from expertmix.routers.arrow import Arrow
from expertmix.routers.fixed import Fixed
from expertmix.routers.lag import Lag
from expertmix.routers.oracle import Oracle
from expertmix.routers.pooled import Pooled
from expertmix.routers.router import Router
from expertmix.routers.spectr import SpectR
from expertmix.routers.uniform import Uniform
from expertmix.study.bootstrap import Draws, estimate, ratio
from expertmix.study.contest import Contestant, read
from expertmix.study.corpus import Corpus
from expertmix.study.evaluation import Evaluation, evaluate

Figures = Iterator[tuple[str, float]]
Routers = dict[str, Router | None]


@dataclass(frozen=True)
class Setting:
    """What all parts need.

    Attributes:
        data: The data folder.
        model: The base, in float32.
        tokenizer: Its tokenizer.
        adapters: The shipped library.
        scale: Texts and questions by how many are read in a full run.
        variants: Experts at other ranks, or None.
    """

    data: Path
    model: Any
    tokenizer: Any
    adapters: tuple[Adapter, ...]
    scale: float
    variants: Path | None

    @property
    def shelf(self) -> Shelf:
        """The library, decomposed."""
        return Shelf.of(self.adapters)

    def some(self, count: int) -> int:
        """So many in a full run."""
        return max(1, round(count * self.scale))

    def own(self) -> list[Any]:
        """What the base writes by itself."""
        return [own_text(self.model)]


# -- eight domains -------------------------------------------------------------------------------


def domains(setting: Setting) -> Figures:
    """All contestants on held-out text of the eight domains."""
    corpus = texts.heldout(setting.data, setting.tokenizer, setting.some(20))
    shelf = setting.shelf
    routers: Routers = {
        "base": None,
        "oracle": Oracle(tuple(str(one.label) for one in corpus.samples)),
        **training_free(setting, shelf),
        "spectr_energy": SpectR(score="energy"),
        "spectr_by_rank": SpectR(normalize=("rank",)),
        "spectr_by_size": SpectR(score="energy", normalize=("size",)),
        "spectr_k1": SpectR(top_k=1),
        "lag": Lag(m=4),
        "pooled_raw": ready(setting.model, shelf, Pooled(temperature=0.003), None),
        "pooled_energy": Pooled(inner=SpectR(score="energy")),
        "pooled_arrow": Pooled(inner=Arrow()),
        "pooled_gates_only": Pooled(evidence="*.gate_proj"),
        "ridge": ridge(setting, shelf),
        **{f"only_{name}": Fixed(name) for name in NAMES},
    }
    with tempfile.TemporaryDirectory() as folder:
        others = peft_contestants(setting, Path(folder))
        found = evaluate(setting.model, shelf, routers, corpus, others=others, main="pooled")
    yield from figures_of(found)
    aligned = evaluate(
        setting.model, shelf, {"spectr_aligned": SpectR()}, corpus, combination="aligned"
    )
    yield from losses_of(aligned, "spectr_aligned")


def training_free(setting: Setting, shelf: Shelf) -> Routers:
    """The contestants that no part leaves out."""
    calibrated = SpectR(top_k=3, weights="softmax", temperature=0.5)
    return {
        "uniform": Uniform(),
        "arrow": Arrow(),
        "spectr": SpectR(),
        "spectr_calibrated": calibrate(setting.model, shelf, calibrated, setting.own()),
        "pooled": Pooled(),
    }


def ridge(setting: Setting, shelf: Shelf) -> Router:
    """Fitted to 512 tokens of each adapter's training text."""
    fitted = {
        name: [torch.tensor(texts.training_blocks(setting.data, setting.tokenizer, name, 4))]
        for name in NAMES
    }
    return fit_ridge(setting.model, shelf, fitted)


def peft_contestants(setting: Setting, folder: Path) -> list[Contestant]:
    """PEFT's Arrow and its merges, each on a base of its own."""
    targets = ("gate_proj", "up_proj", "down_proj")
    library = rivals.padded_library(folder, setting.adapters, targets)
    arrow = rivals.peft_arrow(fresh_base(), library, top_k=3)
    merges = rivals.peft_merges(fresh_base(), library)
    found = [Contestant.model("peft_arrow", arrow)]
    return found + [
        Contestant(name, partial(rivals.merged, merges, name)) for name in rivals.MERGES
    ]


def fresh_base() -> Any:
    """The base in float32."""
    model: Any = load_default()[0]
    return model.float().eval()


# -- two domains in one text ---------------------------------------------------------------------


def mixed(setting: Setting) -> Figures:
    """How soon the router follows when a text changes its domain in the middle."""
    corpus = texts.mixtures(setting.data, setting.tokenizer, setting.some(32))
    shelf = setting.shelf
    routers = training_free(setting, shelf) | {
        f"pooled_half_life_{life}": Pooled(half_life=life) for life in (4, 8, 32, 64, None)
    }
    for name, router in routers.items():
        if router is not None:
            right_NS = followed(setting, shelf, ready(setting.model, shelf, router), corpus)
            yield from switch(f"mixture_{name}", right_NS)
    contest: Routers = {"base": None, **routers}
    found = evaluate(setting.model, shelf, contest, corpus, main="pooled")
    for name in contest:
        yield from interval(f"mixture_loss_{name}", found.loss(name))


def followed(setting: Setting, shelf: Shelf, router: Router, corpus: Corpus) -> torch.Tensor:
    """(N, S) whether a token went to the adapter of its half's domain."""
    rows = []
    with Composed(setting.model, shelf, router) as composed:
        for sample in corpus.samples:
            with record(composed) as trace, torch.no_grad():
                setting.model(torch.tensor([sample.ids]))
            mass_SE = torch.stack([trace[site].dense() for site in trace.sites]).sum(0)
            half = texts.LENGTH // 2
            own = [NAMES.index(name) for name in str(sample.label).split(">")]
            own_S = torch.tensor(own).repeat_interleave(half)
            rows.append(mass_SE.argmax(1) == own_S)
    return torch.stack(rows)


def switch(name: str, right_NS: torch.Tensor) -> Figures:
    """Shares of right tokens before the switch, and so many tokens after it."""
    half = texts.LENGTH // 2
    windows = {"before": (half - 16, half), "after_0_8": (half, half + 8)}
    windows |= {f"after_{a}_{b}": (half + a, half + b) for a, b in ((8, 16), (16, 32), (32, 64))}
    for window, (start, stop) in windows.items():
        yield f"{name}_token_{window}", float(right_NS[:, start:stop].float().mean())


# -- text of no adapter, a larger shelf, other ranks -----------------------------------------------


def foreign(setting: Setting) -> Figures:
    """Domains of no adapter: what a router costs there, against the base."""
    corpus = texts.unseen(setting.data, setting.tokenizer, setting.some(24))
    routers: Routers = {"base": None, **training_free(setting, setting.shelf)}
    found = evaluate(setting.model, setting.shelf, routers, corpus, main="base")
    for name in routers:
        for label in corpus.labels:
            yield from interval(f"unseen_{label}_minus_base_{name}", found.difference(name, label))


def larger(setting: Setting) -> Figures:
    """Near-duplicates and random adapters beside the eight."""
    twins = [rivals.near_duplicate(one, seed=seed) for one in setting.adapters for seed in (1, 2)]
    crowds = {
        "duplicates_16": twins,
        "decoys_8": rivals.decoys(setting.adapters, 8),
        "decoys_56": rivals.decoys(setting.adapters, 56),
    }
    corpus = texts.heldout(setting.data, setting.tokenizer, setting.some(8))
    oracle = Oracle(tuple(str(one.label) for one in corpus.samples))
    for crowd, more in crowds.items():
        shelf = Shelf.of([*setting.adapters, *more])
        routers: Routers = {"base": None, "oracle": oracle, **training_free(setting, shelf)}
        found = evaluate(setting.model, shelf, routers, corpus, main="pooled")
        for name in list(routers)[2:]:
            yield from interval(f"size_{crowd}_recovered_{name}", found.recovered(name))
            yield from interval(f"size_{crowd}_text_{name}", found.text_accuracy(name))


def ranked(setting: Setting) -> Figures:
    """Two experts at ranks 4, 8, 16 and 32; the others as they are."""
    if setting.variants is None:
        return
    corpus = texts.heldout(setting.data, setting.tokenizer, setting.some(12))
    for rank in (4, 8, 16, 32):
        shelf = Shelf.of([_at_rank(one, rank, setting.variants) for one in setting.adapters])
        routers: Routers = {
            "base": None,
            "oracle": Oracle(tuple(str(one.label) for one in corpus.samples)),
            **training_free(setting, shelf),
            "spectr_by_rank": SpectR(normalize=("rank",)),
        }
        found = evaluate(setting.model, shelf, routers, corpus, main="pooled")
        for name in list(routers)[1:]:
            for label in ("python", "reading"):
                mark = f"rank{rank}_{label}"
                yield from interval(f"{mark}_loss_{name}", found.loss(name, label))
                yield from interval(f"{mark}_token_{name}", found.accuracy(name, label))


def _at_rank(adapter: Adapter, rank: int, variants: Path) -> Adapter:
    return _variant(adapter, f"{adapter.name}-r{rank}", variants)


def _variant(adapter: Adapter, folder: str, variants: Path) -> Adapter:
    """Another adapter of that name, where there is one."""
    path = variants / folder
    return read_adapter(path, adapter.name) if path.is_dir() else adapter


# -- choice questions ----------------------------------------------------------------------------


def tasks(setting: Setting) -> Figures:
    """Accuracy on questions, log-likelihood per character; ARC and OpenBookQA are `science`'s."""
    shelf = setting.shelf
    routers: Routers = {
        "base": None,
        **training_free(setting, shelf),
        "ridge": ridge(setting, shelf),
        "only_science": Fixed("science"),
    }
    made = {name: one and ready(setting.model, shelf, one) for name, one in routers.items()}
    for task in texts.TASKS:
        asked = texts.questions(setting.data, task, setting.some(100))
        corpus = texts.as_corpus(asked, setting.tokenizer)
        right: dict[str, list[float]] = {}
        for name, router in made.items():
            contestant = Contestant.routed(name, setting.model, shelf, router)
            right[name] = texts.right_answers(asked, read(contestant, corpus, batch_size=16).losses)
        yield f"{task}_questions", len(asked)
        yield f"{task}_chance", sum(1 / len(one.choices) for one in asked) / len(asked)
        for name, found in right.items():
            yield from interval(f"{task}_accuracy_{name}", _mean(found))
            gained = [a - b for a, b in zip(found, right["base"], strict=True)]
            yield from interval(f"{task}_minus_base_{name}", _mean(gained))


def _mean(values: Sequence[float]) -> Estimate:
    top, bottom = Draws(len(values)).sums(values, [1.0] * len(values))
    return estimate(ratio(top, bottom), len(values))


# -- figures ---------------------------------------------------------------------------------------


def figures_of(found: Evaluation) -> Figures:
    """Everything that an evaluation knows."""
    for name in found.names:
        yield from losses_of(found, name)
        yield from interval(f"recovered_{name}", found.recovered(name))
        yield from interval(f"minus_{found.main}_{name}", found.difference(name))
        yield from interval(f"token_{name}", found.accuracy(name))
        yield from interval(f"text_{name}", found.text_accuracy(name))
        levels = found.level_accuracy(name)
        sites = [share for level, share in levels.items() if level.endswith("_proj#0")]
        if sites:
            yield f"site_{name}", sum(sites) / len(sites)
        for label in found.corpus.labels:
            yield from interval(f"token_{name}_{label}", found.accuracy(name, label))


def losses_of(found: Evaluation, name: str) -> Figures:
    """Loss over all texts, and by domain."""
    yield from interval(f"loss_{name}", found.loss(name))
    for label in found.corpus.labels:
        yield f"loss_{name}_{label}", found.loss(name, label).value


def interval(name: str, found: Estimate | None) -> Figures:
    """A value and its interval."""
    if found is not None:
        yield name, found.value
        yield f"{name}_low", found.low
        yield f"{name}_high", found.high


PARTS: dict[str, Callable[[Setting], Figures]] = {
    "domains": domains,
    "mixtures": mixed,
    "unseen": foreign,
    "size": larger,
    "rank": ranked,
    "tasks": tasks,
}


def measure(options: argparse.Namespace) -> Figures:
    """The parts that were asked for."""
    torch.set_num_threads(1)
    tokenizer = load_default()[1]
    adapters = tuple(read_library(ASSETS / "experts"))
    setting = Setting(
        options.data, fresh_base(), tokenizer, adapters,
        0.1 if options.quick else 1.0, options.variants,
    )  # fmt: skip
    for part in options.parts or (["unseen"] if options.quick else list(PARTS)):
        yield from PARTS[part](setting)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    parser = figures.parser(__doc__, "one part, a tenth of the texts")
    parser.add_argument("--data", type=Path, required=True, help="the data folder")
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), help="instead of all")
    parser.add_argument("--variants", type=Path, help="experts at other ranks, NAME-rRANK")
    options = parser.parse_args()
    figures.show("_".join(["spectr_quality", *(options.parts or ())]), options, measure)
