"""Optimize routing for every item of a task, and write a results folder: `run_optimize`.

The folder holds `results.parquet` (a row per item and contestant), `results.json` (what they show)
and, where they are wanted, the interventions of each method. While the job runs it also holds a
ledger of the batches that are done; a job that was killed goes on behind the last of them, and ends
with the same numbers as one that was not. Reference sets stay in the folder, one per content.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from expertmix.bindings.pathways import open_pathways
from expertmix.core.intervention import InOrder
from expertmix.core.pathway import Pathways
from expertmix.core.progress import Progress, quiet
from expertmix.core.reweight import Reweight
from expertmix.core.serialize import from_json
from expertmix.experts.compose import ready
from expertmix.experts.composed import Composed
from expertmix.optimize.reference import ReferenceSet
from expertmix.report.table import Table
from expertmix.study import figures
from expertmix.study.contestants import Contestant
from expertmix.study.ledger import Ledger, finished, ledger
from expertmix.study.loading import load_model
from expertmix.study.optimize_page import optimize_page
from expertmix.study.optimize_plan import OptimizePlan, plan_optimize
from expertmix.study.optimize_rows import ItemRow, item_rows, write_rows
from expertmix.study.optimize_runs import Batch, Examples, Runner, Scored
from expertmix.study.optimize_settings import OptimizeJob
from expertmix.study.optimize_summary import Line, summary
from expertmix.study.optimize_verdict import summary_tables, verdict
from expertmix.study.outputs import results, write_json

LEDGER = "unfinished.jsonl"


@dataclass(frozen=True, eq=False, slots=True)
class OptimizeResult:
    """What a job gave.

    Attributes:
        folder: Where its files are, or None.
        figures: The content of results.json.
        rows: A row per contestant and item.
        lines: A line per contestant.
        said: What they show, in words.
        resumed: Answers that an earlier, unfinished run had left: one per contestant and question.
    """

    folder: Path | None
    figures: dict[str, Any]
    rows: tuple[ItemRow, ...]
    lines: tuple[Line, ...]
    said: tuple[str, ...]
    resumed: int

    @property
    def tables(self) -> tuple[Table, ...]:
        """For the terminal."""
        return summary_tables(self.lines)


def run_optimize(job: OptimizeJob, progress: Progress = quiet) -> OptimizeResult:
    """Do the job; results appear all at the end.

    Raises:
        OutputError: The folder cannot be written.
        ConfigError: The folder holds an unfinished run with other settings.
        ExpertmixError: Whatever `plan_optimize` finds.
        FingerprintError: The reference set was made with another model.
    """
    _check_folder(job.out)
    start = time.perf_counter()
    plan = plan_optimize(job, progress)
    model = load_model(job.model, dtype=job.dtype, device=job.device, progress=progress)
    with _composed(plan, model) as whole, _opened(plan, whole, progress) as pathways:
        book = _ledger(plan, pathways)
        reference = _reference(plan, pathways, progress)
        prepared = time.perf_counter()
        _run(plan, pathways, reference, book, progress)
        seconds = {"setup": prepared - start, "running": time.perf_counter() - prepared}
        rows = _rows(plan, book)
        lines = summary(rows, seed=job.seed)
        content = _figures(plan, reference, pathways, lines, verdict(rows, lines), seconds)
    with finished(book):
        if job.out is not None:
            _deliver(plan, rows, lines, book, content)
    resumed = sum("number" in row for row in book.rows[: book.resumed])
    return OptimizeResult(
        job.out, content, tuple(rows), tuple(lines), tuple(content["shows"]), resumed
    )


def _check_folder(out: Path | None) -> None:
    """Before any work: whether results can be written there."""
    if out is None:
        return
    with results(out):
        pass


@contextmanager
def _composed(plan: OptimizePlan, model: Any) -> Iterator[Any]:
    """The model, with its adapters if it has any."""
    if plan.composition is None or plan.router is None:
        yield model
        return
    shelf = plan.composition.shelf
    with Composed(model, shelf, ready(model, shelf, plan.router)):
        yield model


@contextmanager
def _opened(plan: OptimizePlan, model: Any, progress: Progress) -> Iterator[Pathways]:
    shift = any(one.method is not None and one.method.mode == "add" for one in plan.contestants)
    job = plan.job
    with open_pathways(
        model,
        layers=job.where,
        decisions=job.decisions,
        scored=job.scored,
        shift=shift,
        progress=progress,
    ) as pathways:
        yield pathways


def _ledger(plan: OptimizePlan, pathways: Pathways) -> Ledger:
    out = plan.job.out
    identity = plan.identity(pathways.fingerprint())
    path = None if out is None else out / LEDGER
    return ledger(path, identity, restart=plan.job.restart)


def _reference(plan: OptimizePlan, pathways: Pathways, progress: Progress) -> ReferenceSet:
    """Loaded, or built; a set of the same content is built once per folder."""
    job = plan.job
    if plan.reference is None:
        found = ReferenceSet.load(job.reference)
        found.check(pathways)
        return found
    samples = [one.sample for one in plan.reference.asked]
    to = None
    if job.out is not None:
        to = job.out / f"reference-{_content(plan, pathways)}"
        if job.restart:
            shutil.rmtree(to, ignore_errors=True)
    return ReferenceSet.build(
        pathways, samples, to=to, batch_size=job.batch_size, progress=progress
    )


def _content(plan: OptimizePlan, pathways: Pathways) -> str:
    """Of a reference set, in few letters."""
    found = plan.identity(pathways.fingerprint())
    parts = [found[name] for name in ("model", "reference", "layers", "decisions", "batch_size")]
    return hashlib.sha256(json.dumps([*parts, pathways.exact]).encode()).hexdigest()[:8]


def _run(
    plan: OptimizePlan,
    pathways: Pathways,
    reference: ReferenceSet,
    book: Ledger,
    progress: Progress,
) -> None:
    job, asked = plan.job, plan.task.asked
    runner = Runner(
        pathways, reference, asked, neighbors=job.neighbors, gate=job.keeping,
        examples=Examples.of(plan.tokenizer, plan.context), batch_size=job.batch_size,
        edits=job.interventions,
    )  # fmt: skip
    known = {(row["of"], row["number"]) for row in book.rows if "number" in row}
    for contestant in plan.contestants:
        left = [number for number in range(len(asked)) if (contestant.name, number) not in known]
        done = len(asked) - len(left)
        progress(contestant.name, done, len(asked))
        for batch in runner.run(contestant, left) if left else ():
            book.append(_entries(contestant, batch))
            done += len(batch.scored)
            progress(contestant.name, done, len(asked))


def _entries(contestant: Contestant, batch: Batch) -> list[dict[str, Any]]:
    rows = [{"of": contestant.name, **one.to_dict()} for one in batch.scored]
    edits = [] if batch.edits is None else [{"of": contestant.name, "edits": batch.edits}]
    return [*rows, *edits]


def _rows(plan: OptimizePlan, book: Ledger) -> list[ItemRow]:
    """By contestant, then by item."""
    found: dict[str, dict[int, Scored]] = {}
    for row in book.rows:
        if "number" in row:
            found.setdefault(row["of"], {})[row["number"]] = Scored.from_dict(row)
    return [
        row
        for one in plan.contestants
        for row in item_rows(one, plan.task.items, plan.task.asked, found[one.name])
    ]


def _figures(
    plan: OptimizePlan,
    reference: ReferenceSet,
    pathways: Pathways,
    lines: Sequence[Line],
    said: Sequence[str],
    seconds: dict[str, float],
) -> dict[str, Any]:
    return plan.figures() | {
        "command": "optimize",
        "fingerprint": pathways.fingerprint(),
        "exact_suffix": pathways.exact,
        "references_tried": reference.meta.tried,
        "references_kept": len(reference),
        "results": [line.figures() for line in lines],
        "shows": list(said),
        "seconds": figures.named(seconds),
        "machine": figures.machine(),
        "versions": figures.versions(),
    }


def _deliver(
    plan: OptimizePlan,
    rows: Sequence[ItemRow],
    lines: Sequence[Line],
    book: Ledger,
    content: dict[str, Any],
) -> None:
    assert plan.job.out is not None
    with results(plan.job.out) as folder:
        if plan.job.report:
            optimize_page(plan, rows, lines, content).save(folder / "report.html")
        write_rows(folder / "results.parquet", rows, _texts(plan) if plan.job.text else None)
        for one in plan.contestants if plan.job.interventions else ():
            if one.edits:
                edits = [r["edits"] for r in book.rows if "edits" in r and r["of"] == one.name]
                write_json(folder / f"interventions-{one.file}.json", joined(edits).to_dict())
        write_json(folder / "results.json", content)


def joined(edits: Sequence[dict[str, Any]]) -> InOrder:
    """The interventions of all batches as one: those alike, which differ in rows only, are one."""
    groups: dict[tuple[Any, ...], list[Reweight]] = {}
    for one in edits:
        for part in from_json(json.dumps(one)).parts():
            assert isinstance(part, Reweight), "outcomes become nothing else"
            key = (part.sites, part.stage, part.mode, part.positions)
            groups.setdefault(key, []).append(part)
    return InOrder(*(_merged(parts) for parts in groups.values()))


def _merged(parts: Sequence[Reweight]) -> Reweight:
    rows = tuple(row for part in parts for row in part.samples or ())
    return replace(parts[0], values=torch.cat([part.values for part in parts]), samples=rows)


def _texts(plan: OptimizePlan) -> list[tuple[str, list[str]]]:
    return [(item.prompt, list(item.choices)) for item in plan.task.items]
