"""Answer prompts with a base and routed adapters, and write a results folder: `run_compose`.

The folder holds `answers.jsonl`, `trace.parquet`, `results.json` and, unless it is not wanted,
`report.html`. Where labels name adapters, or routers are compared, the prompts are also read.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from expertmix.attribute import usage
from expertmix.attribute.modules import by
from expertmix.core.parquet import TraceWriter
from expertmix.core.partial import output_errors
from expertmix.core.progress import Progress, quiet
from expertmix.core.trace import Chunk, Trace, TraceMeta
from expertmix.experts.compose import ready
from expertmix.experts.composed import Composed
from expertmix.experts.fitting import calibrate
from expertmix.report import words
from expertmix.report.answers import AnswerView
from expertmix.report.report import Report
from expertmix.report.table import Table
from expertmix.routers.router import Router
from expertmix.study import figures
from expertmix.study.answer_rows import answer_rows, answer_views, mean_shares, strips_of
from expertmix.study.compose_plan import ComposeJob, ComposePlan, plan_compose
from expertmix.study.corpus import Corpus
from expertmix.study.evaluation import Evaluation, evaluate
from expertmix.study.evaluation_tables import evaluation_figures, routing_check, tables
from expertmix.study.generation import Answer, Keep, generate
from expertmix.study.loading import load_model
from expertmix.study.outputs import results, write_json

_STRIPS = 12  # answers that the page shows token by token


@dataclass(frozen=True, eq=False, slots=True)
class ComposeResult:
    """What a job gave.

    Attributes:
        folder: Where its files are, or None.
        figures: The content of results.json.
        rows: The lines of answers.jsonl.
        views: The answers for the terminal.
        adapters: Their names.
        shares: Share of each adapter in the weight of all answers.
        tables: For the terminal.
    """

    folder: Path | None
    figures: dict[str, Any]
    rows: tuple[dict[str, Any], ...]
    views: tuple[AnswerView, ...]
    adapters: tuple[str, ...]
    shares: tuple[float, ...]
    tables: tuple[Table, ...]


@dataclass(frozen=True, eq=False, slots=True)
class _Done:
    """What came of the model."""

    plan: ComposePlan
    settings: str
    answers: tuple[Answer, ...]
    evaluation: Evaluation | None
    seconds: dict[str, float]

    @property
    def tables(self) -> tuple[Table, ...]:
        return () if self.evaluation is None else tables(self.evaluation)


def run_compose(job: ComposeJob, progress: Progress = quiet) -> ComposeResult:
    """Do the job; nothing is written unless all of it succeeds.

    Raises:
        OutputError: The folder cannot be written.
        ExpertmixError: Whatever `plan_compose` finds.
    """
    with _folder(job.out) as folder:
        plan = plan_compose(job, progress)
        done = _run(plan, folder, progress)
        content = _figures(done)
        if folder is not None:
            _write(done, content, folder, progress)
    return ComposeResult(
        folder=job.out,
        figures=content,
        rows=answer_rows(plan, done.answers, text=True),
        views=answer_views(plan, done.answers),
        adapters=plan.composition.shelf.names,
        shares=mean_shares(done.answers),
        tables=done.tables,
    )


@contextmanager
def _folder(out: Path | None) -> Iterator[Path | None]:
    if out is None:
        yield None
        return
    with results(out) as folder:
        yield folder


def _run(plan: ComposePlan, folder: Path | None, progress: Progress) -> _Done:
    job, shelf = plan.job, plan.composition.shelf
    start = time.perf_counter()
    model = load_model(job.base, dtype=job.dtype, device=job.device, progress=progress)
    routers = _prepared(plan, model, progress)
    router = routers[job.main]
    assert router is not None, "the base alone composes nothing"
    prepared = time.perf_counter()
    with Composed(model, shelf, router, combination=job.combination) as composed:
        answers = _answers(plan, composed, folder, progress)
    answered = time.perf_counter()
    evaluation = None
    if plan.reads:
        evaluation = evaluate(
            model, shelf, routers, plan.texts, combination=job.combination,
            batch_size=job.batch_size, progress=progress,
        )  # fmt: skip
    read = time.perf_counter()
    seconds = {
        "setup": prepared - start,
        "answering": answered - prepared,
        "reading": read - answered,
    }
    return _Done(plan, repr(router), answers, evaluation, seconds)


def _prepared(plan: ComposePlan, model: Any, progress: Progress) -> dict[str, Router | None]:
    """The routers: the main one calibrated on the given text, others as they are without any."""
    progress("preparing the routers", 0, 0)
    shelf, routers = plan.composition.shelf, dict(plan.routers)
    if plan.calibration is not None:
        texts = _tensors(plan.calibration, model.device)
        routers[plan.job.main] = calibrate(model, shelf, plan.main, texts)
    return {
        name: None if one is None else ready(model, shelf, one) for name, one in routers.items()
    }


def _tensors(corpus: Corpus, device: torch.device) -> list[torch.Tensor]:
    return [torch.tensor([sample.ids], device=device) for sample in corpus.samples]


def _answers(
    plan: ComposePlan, composed: Composed, folder: Path | None, progress: Progress
) -> tuple[Answer, ...]:
    with _kept(None if folder is None else folder / "trace.parquet", plan.job.text) as keep:
        return generate(
            composed,
            plan.asked,
            plan.composition.base.tokenizer,
            plan.job.decoding,
            told=plan.told,
            keep=keep,
            detail=plan.asked.varied(_STRIPS),
            batch_size=plan.job.batch_size,
            progress=progress,
        )


@contextmanager
def _kept(path: Path | None, text: bool) -> Iterator[Keep | None]:
    """Where decisions go: to a trace, which is opened when the first ones tell what they are of."""
    writers: list[TraceWriter] = []
    with ExitStack() as stack:

        def keep(meta: TraceMeta, chunk: Chunk) -> None:
            if path is not None and not writers:
                writers.append(stack.enter_context(TraceWriter(path, meta, text=text)))
            writers[0].write(chunk)

        yield None if path is None else keep


def _write(done: _Done, content: dict[str, Any], folder: Path, progress: Progress) -> None:
    job = done.plan.job
    trace = Trace.load(folder / "trace.parquet")
    content |= _usage(trace)
    if job.report:
        progress("writing the report", 0, 0)
        _report(done, trace, folder / "report.html")
    path = folder / "answers.jsonl"
    rows = answer_rows(done.plan, done.answers, text=job.text)
    with output_errors(path):
        lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows)
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    write_json(folder / "results.json", content)


def _usage(trace: Trace) -> dict[str, Any]:
    """By layer and by kind of module: single sites are hundreds, and stand in the trace."""
    counted = usage(trace, pairs=())
    return {
        "fingerprint": trace.meta.fingerprint,
        "created": trace.meta.created,
        "by_layer": figures.usage_figures(by(counted, lambda module: module.layer)),
        "by_kind": figures.usage_figures(by(counted, lambda module: module.kind)),
    }


def _report(done: _Done, trace: Trace, path: Path) -> None:
    plan, evaluation = done.plan, done.evaluation
    job = plan.job
    Report.of(
        trace,
        title="Which adapters make the answers?",
        intro=_intro(done),
        tables=done.tables,
        strips=strips_of(plan, done.answers, trace.meta, text=job.text),
        routing=None if evaluation is None else routing_check(evaluation, job.main),
    ).save(path)


def _intro(done: _Done) -> str:
    """What was run, and the adapters by their share of all weight in the answers."""
    plan, names = done.plan, done.plan.composition.shelf.names
    asked = (
        f"{words.counted(len(plan.asked), 'prompt')} of {plan.job.prompts.name}, answered with "
        f"{words.counted(len(names), 'adapter')} under the router {plan.job.main}"
    )
    shares = mean_shares(done.answers)
    order = sorted(range(len(names)), key=lambda number: -shares[number])
    listed = [f"{names[n]} {words.percent(shares[n])}" for n in order if shares[n] > 0]
    if not listed:
        return f"{asked}: no answer has a token."
    return (
        f"{asked}. Weight in the answers: {words.listed(listed)}. Counts further down are of "
        f"prompts and answers together, unless they say otherwise."
    )


def _figures(done: _Done) -> dict[str, Any]:
    plan, names = done.plan, done.plan.composition.shelf.names
    shares = dict(zip(names, mean_shares(done.answers), strict=True))
    return plan.figures() | {
        "command": "compose",
        "settings": done.settings,
        "shares": figures.named(shares),
        "new_tokens": sum(len(answer.ids) for answer in done.answers),
        "evaluation": None if done.evaluation is None else evaluation_figures(done.evaluation),
        "seconds": figures.named(done.seconds),
        "machine": figures.machine(),
        "versions": figures.versions(),
    }
