"""`expertmix compose`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from expertmix.cli.screen import Screen
from expertmix.study.names import Dtype

if TYPE_CHECKING:
    from expertmix.study.compose_job import ComposeResult
    from expertmix.study.compose_plan import ComposePlan

_Base = Annotated[
    str,
    typer.Argument(
        help="Hub id, local folder, or the word default.", metavar="BASE", show_default=False
    ),
]
_Library = Annotated[
    str,
    typer.Argument(
        help="Folder or hub id of PEFT LoRA adapters, or the word default.",
        metavar="LIBRARY",
        show_default=False,
    ),
]
_Prompts = Annotated[
    Path,
    typer.Option(
        help=".txt (one prompt a line) or .jsonl (text, label; a label may name an adapter).",
        show_default=False,
    ),
]
_Router = Annotated[
    str,
    typer.Option(
        help="pooled, spectr, arrow, lag, uniform, oracle; or with settings, such as "
        '"fixed weights=NAME".'
    ),
]
_Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="A setting of the router, such as top_k=2.",
        metavar="KEY=VALUE",
        show_default=False,
    ),
]
_Combination = Annotated[
    Literal["outputs", "aligned"], typer.Option(help="How the adapters' parts combine.")
]
_Calibrate = Annotated[
    Path | None,
    typer.Option(
        help="Unlabelled text that makes the adapters' scores comparable.", show_default=False
    ),
]
_AnyBase = Annotated[
    bool, typer.Option("--any-base", help="Allow adapters that name another base.")
]
_Against = Annotated[
    list[str] | None,
    typer.Option(
        help='Read the prompts under this router too: arrow, base, "spectr top_k=1", …',
        metavar="ROUTER",
        show_default=False,
    ),
]
_Tokens = Annotated[int, typer.Option(help="Length of an answer at most.", min=1)]
_Temperature = Annotated[float, typer.Option(help="0 takes the most likely token.", min=0.0)]
_Seed = Annotated[int, typer.Option(help="Of drawing tokens.")]
_Chat = Annotated[bool, typer.Option("--chat", help="Put prompts into the chat template.")]
_Out = Annotated[
    Path | None, typer.Option(help="Results folder; its files are replaced.", show_default=False)
]
_Text = Annotated[bool, typer.Option("--text", help="Keep prompts and words in what is written.")]
_BatchSize = Annotated[int, typer.Option(help="Prompts per batch.", min=1)]
_Dtype = Annotated[Dtype, typer.Option(help="Of the weights; auto: as stored.")]
_Device = Annotated[str, typer.Option(help="cpu, cuda, …; auto takes an accelerator.")]
_DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check all inputs; load no weights, write nothing.")
]
_Report = Annotated[bool, typer.Option(help="Write report.html, with --out.")]


def compose(
    ctx: typer.Context,
    base: _Base,
    library: _Library,
    prompts: _Prompts,
    router: _Router = "pooled",
    set_: _Set = None,
    combination: _Combination = "outputs",
    calibrate: _Calibrate = None,
    any_base: _AnyBase = False,
    against: _Against = None,
    max_new_tokens: _Tokens = 40,
    temperature: _Temperature = 0.0,
    seed: _Seed = 0,
    chat: _Chat = False,
    out: _Out = None,
    text: _Text = False,
    batch_size: _BatchSize = 8,
    dtype: _Dtype = "auto",
    device: _Device = "auto",
    dry_run: _DryRun = False,
    report: _Report = True,
) -> None:
    """Answer prompts with a shelf of LoRA adapters, chosen per token and module.

    Every token has the color of the adapter that had most weight where it was
    made. With --out, writes answers.jsonl, trace.parquet, results.json and
    report.html. Where labels name adapters, or with --against, the prompts are
    also read as text, and the routers compared.
    """
    from expertmix.study.compose_job import run_compose
    from expertmix.study.compose_plan import ComposeJob, plan_compose

    screen: Screen = ctx.obj
    job = ComposeJob(
        base=base,
        library=library,
        prompts=prompts,
        router=router,
        settings=tuple(set_ or ()),
        combination=combination,
        calibrate=calibrate,
        any_base=any_base,
        against=tuple(against or ()),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        chat=chat,
        out=out,
        text=text,
        batch_size=batch_size,
        dtype=dtype,
        device=device,
        report=report,
    )
    if dry_run:
        with screen.progress() as progress:
            plan = plan_compose(job, progress)
        _show_plan(screen, plan)
    else:
        with screen.progress() as progress:
            done = run_compose(job, progress)
        _show_result(screen, done)


def _show_plan(screen: Screen, plan: ComposePlan) -> None:
    from expertmix.report import words

    found = plan.figures()
    screen.emit(found)
    rivals = f", then read under {found['readings']} routers" if len(plan.routers) > 1 else ""
    screen.show(
        f"{found['architecture']} with {words.counted(len(found['adapters']), 'adapter')} at "
        f"{words.counted(found['sites'], 'module')}: {', '.join(plan.composition.shelf.names)}",
        f"router {found['router']}: {found['settings']}",
        f"{words.counted(len(plan.asked), 'prompt')}, "
        f"{words.counted(plan.asked.tokens, 'token')}, answered with up to "
        f"{words.counted(plan.job.max_new_tokens, 'token')} each{rivals}",
        f"would write {', '.join(plan.files)} to {plan.job.out}"
        if plan.job.out
        else "would write nothing; --out names a folder",
    )


def _show_result(screen: Screen, done: ComposeResult) -> None:
    from expertmix.report.answers import answer, legend
    from expertmix.report.terminal import data_table

    screen.emit(done.figures | {"answers": list(done.rows)})
    for view in done.views:
        screen.show(answer(view, done.adapters), "")
    ties = any(number is None for view in done.views for number in view.first)
    screen.show(legend(done.adapters, done.shares, ties=ties))
    screen.show(*(data_table(table) for table in done.tables))
    if done.folder is not None:
        for name in done.figures["files"]:
            screen.show(f"wrote {done.folder / name}")
