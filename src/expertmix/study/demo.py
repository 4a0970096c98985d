"""The main job, version one: eight kinds of text through a MoE of eight experts.

It records who serves what, compares the loss of base, MoE and own expert, takes each expert away
(ablated, and masked), and writes a results folder. The texts are the project's own, written for
this purpose in the forms of the experts' training text: very short ones of a kind are joined by the
separator that the training used. Names and events in them are invented.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from expertmix.attribute import Usage, pool, usage
from expertmix.bindings.record import sites
from expertmix.core.progress import Progress, quiet
from expertmix.core.trace import Trace
from expertmix.errors import ConfigError
from expertmix.report.effect import Effect
from expertmix.report.report import Report
from expertmix.report.table import Table
from expertmix.study import figures
from expertmix.study.comparison import Comparison, compare
from expertmix.study.corpus import Corpus, encode
from expertmix.study.loading import context_length, load_model, load_tokenizer
from expertmix.study.names import DEFAULT, DEFAULT_MOE
from expertmix.study.outputs import results, write_json
from expertmix.study.prompts import read_prompts
from expertmix.study.removal import KINDS, Removals, remove_each
from expertmix.study.service import service_table
from expertmix.study.tracing import Keep

FILES = ("report.html", "trace.parquet", "results.json")


@dataclass(frozen=True, slots=True)
class Size:
    """How much a demo reads.

    Attributes:
        samples: Texts per domain.
        removal_samples: Of these, texts per domain that are read again without each expert.
        length: Tokens per text at most.
    """

    samples: int
    removal_samples: int
    length: int


FULL = Size(samples=7, removal_samples=2, length=176)
QUICK = Size(samples=2, removal_samples=1, length=48)


@dataclass(frozen=True, eq=False, slots=True)
class DemoResult:
    """What a demo gave.

    Attributes:
        folder: Where its files are.
        figures: The content of results.json.
        service: Who is called.
        tables: Losses, and what is lost without each expert.
        effects: The second table in full.
    """

    folder: Path
    figures: dict[str, Any]
    service: Table
    tables: tuple[Table, ...]
    effects: tuple[Effect, ...]


def run_demo(
    out: str | Path,
    quick: bool = False,
    progress: Progress = quiet,
    *,
    base: str = DEFAULT,
    moe: str = DEFAULT_MOE,
) -> DemoResult:
    """Run the demo and write its folder; nothing is written unless all of it succeeds.

    Args:
        out: Results folder; its files are replaced.
        quick: Fewer and shorter texts: a smoke test, too little to read numbers from.
        progress: Told what is going on.
        base: The dense model: `default`, a folder or a hub id.
        moe: A MoE whose experts are named as the domains are.

    Raises:
        MissingDependencyError: The default LM is not installed.
        OutputError: The folder cannot be written.
        ConfigError: The MoE has no expert for a domain.
    """
    clock = _Clock()
    with results(Path(out)) as folder:
        dense = load_model(base, progress=progress)
        routed = load_model(moe, progress=progress)
        tokenizer = load_tokenizer(moe)
        experts = sites(routed)[0].experts
        size = QUICK if quick else FULL
        corpus = demo_corpus(tokenizer, size, context_length(routed.config, tokenizer))
        _check_experts(corpus, experts)
        clock.mark("setup")
        keep = Keep(to=folder / "trace.parquet", tokenizer=tokenizer)
        compared = compare(dense, routed, corpus, experts, keep=keep, progress=progress)
        clock.mark("comparison")
        removed = remove_each(
            routed, corpus.first(size.removal_samples), experts, progress=progress
        )
        clock.mark("removal")
        progress("writing the report", 0, 0)
        trace = Trace.load(folder / "trace.parquet")
        _report(trace, compared, removed, quick=quick).save(folder / "report.html")
        clock.mark("report")
        counted = usage(trace)
        content = _figures(compared, removed, counted, quick=quick) | {"seconds": clock.seconds}
        write_json(folder / "results.json", content)
    tables = (compared.table(), removed.table())
    effects = tuple(removed.effects())
    return DemoResult(Path(out), content, service_table(counted), tables, effects)


def demo_corpus(tokenizer: Any, size: Size, context: int | None = None) -> Corpus:
    """The demo's own texts as tokens."""
    with as_file(files("expertmix.study") / "demo_texts.jsonl") as path:
        prompts = read_prompts(path)
    longest = min(size.length, context or size.length)
    return encode(prompts, tokenizer, context=longest, truncate=True).first(size.samples)


class _Clock:
    """Seconds per stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def mark(self, stage: str) -> None:
        """The stage that ran until now."""
        now = time.perf_counter()
        self.seconds[stage] = round(now - self._last, 1)
        self._last = now


def _check_experts(corpus: Corpus, experts: tuple[str, ...]) -> None:
    for domain in corpus.labels:
        if domain not in experts:
            known = ", ".join(experts) or "numbers only"
            raise ConfigError(
                f"the demo needs a MoE with an expert named {domain!r}; it has {known}"
            )


def _report(trace: Trace, compared: Comparison, removed: Removals, *, quick: bool) -> Report:
    corpus = compared.moe.corpus
    caution = " This was a quick run: too little text to read numbers from." if quick else ""
    return Report.of(
        trace,
        title="Who serves which text?",
        intro=(
            f"A mixture of {len(removed.experts)} experts, made from one small language model and "
            f"LoRA experts that were trained for it, reads {len(corpus)} short texts "
            f"({corpus.tokens:,} tokens) of {len(corpus.labels)} kinds, all written for this demo. "
            f"Two different questions are answered below: which experts are called often, and what "
            f"is lost when one is taken away.{caution}"
        ),
        effects=removed.effects(),
        tables=(compared.table(), removed.table()),
    )


def _figures(
    compared: Comparison, removed: Removals, counted: Usage, *, quick: bool
) -> dict[str, Any]:
    trace = compared.trace
    return {
        "command": "demo",
        "quick": quick,
        "model": trace.meta.model,
        "fingerprint": trace.meta.fingerprint,
        "created": trace.meta.created,
        "experts": list(removed.experts),
        "samples": len(compared.moe.corpus),
        "tokens": compared.moe.corpus.tokens,
        "domains": {name: _domain(compared, counted, name) for name in compared.domains},
        "removal": _removal(removed),
        "usage": figures.usage_figures(counted),
        "machine": figures.machine(),
        "versions": figures.versions(),
    }


def _domain(compared: Comparison, counted: Usage, domain: str) -> dict[str, Any]:
    base, moe, own = compared.losses(domain)
    tally, experts = pool(counted.sites, domain), counted.sites[0].info.experts
    corpus = compared.moe.corpus.labeled(domain)
    return {
        "samples": len(corpus),
        "tokens": corpus.tokens,
        "loss": figures.named({"base": base, "moe": moe, "own_expert": own}),
        "gain_reached": figures.number(compared.reached(domain)),
        "called": _by_expert(experts, tally.frequency.tolist()),
        "first_choice": _by_expert(experts, tally.first_choice.tolist()),
        "mass": _by_expert(experts, tally.mass.tolist()),
        "most_first_choices": experts[int(tally.first_choice.argmax())],
    }


def _by_expert(experts: tuple[str, ...], values: list[float]) -> dict[str, float | None]:
    return figures.named(dict(zip(experts, values, strict=True)))


def _removal(removed: Removals) -> dict[str, Any]:
    return {
        "samples": len(removed.before.corpus),
        "tokens": removed.before.corpus.tokens,
        "loss_before": figures.named(removed.before.by_label()),
        "loss_growth": {kind: _growth(removed, kind) for kind in KINDS},
    }


def _growth(removed: Removals, kind: str) -> dict[str, dict[str, float | None]]:
    """Expert -> domain -> what is lost."""
    domains = removed.before.corpus.labels
    return {
        expert: figures.named({domain: removed.lost(kind, expert, domain) for domain in domains})
        for expert in removed.experts
    }
