"""`expertmix trace`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from expertmix.cli.screen import Screen
from expertmix.study.names import Dtype

if TYPE_CHECKING:
    from expertmix.study.trace_job import TracePlan, TraceResult


_Model = Annotated[
    str, typer.Argument(help="Hub id, local folder, or the word default-moe.", show_default=False)
]
_Prompts = Annotated[
    Path,
    typer.Option(help=".txt (one prompt a line) or .jsonl (text, label).", show_default=False),
]
_Out = Annotated[
    Path, typer.Option(help="Results folder; its files are replaced.", show_default=False)
]
_Ablate = Annotated[
    list[str] | None,
    typer.Option(
        help="Drop an expert after selection; nobody steps in.",
        metavar="SITE:EXPERT",
        show_default=False,
    ),
]
_Mask = Annotated[
    list[str] | None,
    typer.Option(
        help="Forbid an expert; the router chooses again.",
        metavar="SITE:EXPERT",
        show_default=False,
    ),
]
_Replay = Annotated[
    Path | None, typer.Option(help="Force the decisions of this trace.", show_default=False)
]
_Logits = Annotated[bool, typer.Option("--logits", help="Record the gate's logits too.")]
_Text = Annotated[bool, typer.Option("--text", help="Keep token strings; ids are always kept.")]
_BatchSize = Annotated[int, typer.Option(help="Prompts per batch.", min=1)]
_Truncate = Annotated[
    bool, typer.Option("--truncate", help="Cut prompts that the model cannot read in full.")
]
_Dtype = Annotated[Dtype, typer.Option(help="Of the weights; auto: as stored.")]
_Device = Annotated[str, typer.Option(help="cpu, cuda, …; auto takes an accelerator.")]
_DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check all inputs; load no weights, write nothing.")
]
_Report = Annotated[bool, typer.Option(help="Write report.html.")]


def trace(
    ctx: typer.Context,
    model: _Model,
    prompts: _Prompts,
    out: _Out,
    ablate: _Ablate = None,
    mask: _Mask = None,
    replay: _Replay = None,
    logits: _Logits = False,
    text: _Text = False,
    batch_size: _BatchSize = 8,
    truncate: _Truncate = False,
    dtype: _Dtype = "auto",
    device: _Device = "auto",
    dry_run: _DryRun = False,
    report: _Report = True,
) -> None:
    """Record which experts a model calls for your prompts, with or without edits.

    Writes trace.parquet, report.html and results.json. With edits the prompts
    are read twice, so that what is lost can be told. SITE is a name or pattern
    from `expertmix models MODEL`, EXPERT a number or a name:
    "*.layers.7.mlp:3", "*:python".
    """
    from expertmix.study.trace_job import TraceJob, plan_trace, run_trace

    screen: Screen = ctx.obj
    job = TraceJob(
        model=model,
        prompts=prompts,
        out=out,
        ablate=tuple(ablate or ()),
        mask=tuple(mask or ()),
        replay=replay,
        logits=logits,
        text=text,
        batch_size=batch_size,
        truncate=truncate,
        dtype=dtype,
        device=device,
        report=report,
    )
    if dry_run:
        with screen.progress() as progress:
            plan = plan_trace(job, progress)
        _show_plan(screen, plan)
    else:
        with screen.progress() as progress:
            done = run_trace(job, progress)
        _show_result(screen, done)


def _show_plan(screen: Screen, plan: TracePlan) -> None:
    screen.emit(plan.figures())
    sites, corpus = plan.outline.sites, plan.corpus
    cut = f", {corpus.truncated} cut" if corpus.truncated else ""
    edits = ", ".join(plan.figures()["edits"]) or "no edits"
    screen.show(
        f"{plan.outline.architecture}: {len(sites)} sites, "
        f"{sites[0].num_experts} experts, {sites[0].top_k} per token",
        f"{len(corpus)} prompts, {corpus.tokens:,} tokens{cut}; {edits}",
        f"would write {', '.join(plan.files)} to {plan.job.out}",
    )


def _show_result(screen: Screen, done: TraceResult) -> None:
    from expertmix.report.terminal import data_table, sites_table, usage_table

    screen.emit(done.figures)
    screen.show(*(data_table(table) for table in done.tables))
    screen.show(usage_table(done.usage) if done.usage.labels else sites_table(done.usage))
    for name in done.figures["files"]:
        screen.show(f"wrote {done.folder / name}")
