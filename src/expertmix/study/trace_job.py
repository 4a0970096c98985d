"""Record a model on a file of prompts: `TraceJob`, its plan, and its results folder.

The folder holds `trace.parquet`, `results.json` and, unless it is not wanted, `report.html`. With
edits the prompts are read twice, first without them, so that their effect can be told.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expertmix.attribute import Usage, usage
from expertmix.attribute.chain import chains
from expertmix.core.intervention import Intervention
from expertmix.core.progress import Progress, quiet
from expertmix.core.replay import Replay
from expertmix.core.trace import Trace
from expertmix.errors import ReplayError
from expertmix.report import words
from expertmix.report.chain_table import chain_tables
from expertmix.report.effect import Effect
from expertmix.report.report import Report
from expertmix.report.table import Table
from expertmix.study import figures, run_figures
from expertmix.study.addresses import edits
from expertmix.study.corpus import Corpus, encode
from expertmix.study.loading import Outline, load_model, outline
from expertmix.study.names import Dtype
from expertmix.study.outputs import results, write_json
from expertmix.study.prompts import read_prompts
from expertmix.study.tracing import Keep, Run, run

METRIC = "loss (nats per token)"


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceJob:
    """What to record.

    Attributes:
        model: Hub id, folder, `default` or `default-moe`.
        prompts: A .txt or .jsonl file.
        out: Results folder; its files are replaced.
        ablate: Addresses SITE:EXPERT of experts to drop after selection.
        mask: Addresses of experts to forbid before selection.
        replay: A trace whose decisions are forced.
        logits: Record the gate's logits too.
        text: Keep token strings in trace and report; token ids are kept in any case.
        batch_size: Prompts per batch.
        truncate: Cut prompts that are too long.
        dtype: Of the weights.
        device: Where to run.
        report: Write the page.
    """

    model: str
    prompts: Path
    out: Path
    ablate: tuple[str, ...] = ()
    mask: tuple[str, ...] = ()
    replay: Path | None = None
    logits: bool = False
    text: bool = False
    batch_size: int = 8
    truncate: bool = False
    dtype: Dtype = "auto"
    device: str = "auto"
    report: bool = True


@dataclass(frozen=True, eq=False, slots=True)
class TracePlan:
    """A job whose inputs have all been checked; no weights were read.

    Attributes:
        job: The job.
        outline: The model.
        corpus: The prompts as tokens.
        edits: The interventions.
    """

    job: TraceJob
    outline: Outline
    corpus: Corpus
    edits: tuple[Intervention, ...]

    def figures(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "model": self.job.model,
            "architecture": self.outline.architecture,
            "sites": figures.site_list(self.outline.sites),
            "samples": len(self.corpus),
            "tokens": self.corpus.tokens,
            "labels": list(self.corpus.labels),
            "truncated": self.corpus.truncated,
            "edits": descriptions(self.job),
            "runs": 2 if self.edits else 1,
            "files": self.files,
        }

    @property
    def files(self) -> list[str]:
        """What will be written."""
        return ["trace.parquet", "results.json", *(["report.html"] if self.job.report else [])]


@dataclass(frozen=True, eq=False, slots=True)
class TraceResult:
    """What a job gave.

    Attributes:
        folder: Where its files are.
        figures: The content of results.json.
        usage: How often each expert was called.
        tables: For the terminal.
    """

    folder: Path
    figures: dict[str, Any]
    usage: Usage
    tables: tuple[Table, ...]


def plan_trace(job: TraceJob, progress: Progress = quiet) -> TracePlan:
    """Check everything that can be checked without the weights.

    Raises:
        ConfigError: The prompt file is wrong.
        ModelError: The model cannot be used, or a prompt is too long for it.
        AddressError: An edit points at nothing.
        TraceError: The trace to replay cannot be read.
        ReplayError: It was recorded on other prompts.
    """
    prompts = read_prompts(job.prompts)
    model = outline(job.model, progress)
    corpus = encode(prompts, model.tokenizer, context=model.context, truncate=job.truncate)
    found = edits(model.sites, ablate=job.ablate, mask=job.mask)
    if job.replay is not None:
        replayed = Trace.load(job.replay)
        found = (Replay(replayed), *found)
        found[0].targets(model.sites)
        _check_same_text(replayed, corpus, job.replay)
    return TracePlan(job, model, corpus, found)


def _check_same_text(replayed: Trace, corpus: Corpus, path: Path) -> None:
    """Where a trace has token ids, they must be those of the prompts, sample by sample."""
    tokens = replayed.tokens
    known = tokens.rows(tokens.real & (tokens.token_id >= 0))
    if not len(known):
        return
    for number, sample in enumerate(corpus.samples):
        mine = known.rows(known.sample == number)
        recorded = mine.token_id[mine.position.argsort()].tolist()
        if tuple(recorded[: len(sample.ids)]) != sample.ids:
            raise ReplayError(
                f"{path} was recorded on other text: its sample {number} is not the prompt at "
                f"{sample.where}. Replay the same prompt file."
            )


def run_trace(job: TraceJob, progress: Progress = quiet) -> TraceResult:
    """Do the job; nothing is written unless all of it succeeds.

    Raises:
        OutputError: The folder cannot be written.
        ExpertmixError: Whatever `plan_trace` finds.
        FingerprintError: The trace to replay belongs to another model.
    """
    start = time.perf_counter()
    with results(job.out) as folder:
        plan = plan_trace(job, progress)
        model = load_model(job.model, dtype=job.dtype, device=job.device, progress=progress)
        loaded = time.perf_counter() - start
        before = _run(plan, model, progress) if plan.edits else None
        after = _run(plan, model, progress, folder / "trace.parquet")
        assert after.trace is not None
        counted, chained = usage(after.trace), chains(after.trace)
        effects = _effects(job, before, after)
        tables = (_loss_table(before, after),)
        if job.report:
            progress("writing the report", 0, 0)
            _report(job, after, effects, tables, folder / "report.html")
        seconds = {"setup": loaded, "total": time.perf_counter() - start}
        content = _figures(plan, before, after, counted, seconds)
        content |= run_figures.chained(chained, after.updates)
        write_json(folder / "results.json", content)
    return TraceResult(job.out, content, counted, (*tables, *chain_tables(chained)))


def descriptions(job: TraceJob) -> list[str]:
    """The edits as a reader says them."""
    replay = [f"replay {job.replay.name}"] if job.replay else []
    return [
        *replay,
        *(f"ablate {text}" for text in job.ablate),
        *(f"mask {text}" for text in job.mask),
    ]


def _run(plan: TracePlan, model: Any, progress: Progress, to: Path | None = None) -> Run:
    job, tokenizer = plan.job, plan.outline.tokenizer
    keep = Keep(to=to, logits=job.logits, tokenizer=tokenizer if job.text else None)
    return run(
        model,
        plan.corpus,
        *(plan.edits if to else ()),
        keep=keep if to else None,
        batch_size=job.batch_size,
        progress=progress,
        stage="recording" if to else "running without edits",
    )


def _labels(after: Run) -> dict[str, str | None]:
    """Display name -> label; all text comes first."""
    labels = after.corpus.labels
    return {words.all_text(labels): None, **{label: label for label in labels}}


def _effects(job: TraceJob, before: Run | None, after: Run) -> list[Effect]:
    if before is None:
        return []
    name = ", ".join(descriptions(job))
    return [
        Effect(name, shown, before.loss(label), after.loss(label), METRIC)
        for shown, label in _labels(after).items()
    ]


def _loss_table(before: Run | None, after: Run) -> Table:
    rows: list[tuple[str | float | int, ...]] = []
    for shown, label in _labels(after).items():
        samples = after.corpus if label is None else after.corpus.labeled(label)
        pair = [] if before is None else [before.loss(label)]
        change = [] if before is None else [after.loss(label) - before.loss(label)]
        rows.append((shown, len(samples), samples.tokens, *pair, after.loss(label), *change))
    columns = ("loss",) if before is None else ("without edits", "with edits", "what is lost")
    return Table(
        title="Loss",
        columns=("text", "samples", "tokens", *columns),
        rows=tuple(rows),
        note="Mean next-token loss in nats; lower is better.",
    )


def _report(
    job: TraceJob, after: Run, effects: list[Effect], tables: tuple[Table, ...], path: Path
) -> None:
    assert after.trace is not None
    edited = f" with {', '.join(descriptions(job))}" if effects else ""
    Report.of(
        after.trace,
        title=f"Which experts does {after.trace.meta.model} call?",
        intro=f"{len(after.corpus)} prompts of {job.prompts.name}, "
        f"{after.corpus.tokens} tokens{edited}.",
        effects=effects,
        tables=tables,
        strips=12 if job.text else 0,
        updates=after.updates,
    ).save(path)


def _figures(
    plan: TracePlan, before: Run | None, after: Run, counted: Usage, seconds: dict[str, float]
) -> dict[str, Any]:
    assert after.trace is not None
    content = plan.figures()
    del content["runs"]
    return content | {
        "command": "trace",
        "fingerprint": after.trace.meta.fingerprint,
        "created": after.trace.meta.created,
        "interventions": list(after.trace.meta.interventions),
        "loss": run_figures.losses(after),
        "loss_without_edits": None if before is None else run_figures.losses(before),
        "prompts": run_figures.prompts(after),
        "usage": figures.usage_figures(counted),
        "seconds": figures.named(seconds | {"recording": after.seconds}),
        "machine": figures.machine(),
        "versions": figures.versions(),
    }
