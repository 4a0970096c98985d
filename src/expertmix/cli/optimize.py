"""`expertmix optimize`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from expertmix.cli.screen import Screen
from expertmix.study.names import Dtype

if TYPE_CHECKING:
    from expertmix.study.optimize_job import OptimizeResult
    from expertmix.study.optimize_plan import OptimizePlan

_Model = Annotated[
    str,
    typer.Argument(
        help="Hub id, local folder, or the word default-moe.", metavar="MODEL", show_default=False
    ),
]
_Task = Annotated[
    str,
    typer.Option(
        help="Questions to answer: .jsonl, .json, .csv or .parquet with query, choices and gold; "
        "or a public set by name, such as arc_easy.",
        metavar="FILE|NAME",
        show_default=False,
    ),
]
_Reference = Annotated[
    str,
    typer.Option(
        help="Solved questions to learn from, in the same form; or the folder of a reference set.",
        metavar="FILE|NAME|FOLDER",
        show_default=False,
    ),
]
_Method = Annotated[
    str,
    typer.Option(
        help='ngd, kernel_regression, mode_finding, adaptive, …; or with settings: "ngd steps=5".'
    ),
]
_Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="A setting of the method.", metavar="KEY=VALUE", show_default=False),
]
_Against = Annotated[
    list[str] | None,
    typer.Option(help="A method to compare with.", metavar="METHOD", show_default=False),
]
_Controls = Annotated[
    bool,
    typer.Option(
        help="Also random neighbors, shuffled labels, neighbor vote, in-context learning, global "
        "delta, oracle and wrong-label oracle."
    ),
]
_Adapters = Annotated[
    str | None,
    typer.Option(
        help="A library of LoRA adapters to compose on MODEL; their routing is optimized.",
        metavar="LIBRARY",
        show_default=False,
    ),
]
_Router = Annotated[str, typer.Option(help="Of the adapters.")]
_Layers = Annotated[
    str, typer.Option(help="Critical ones: last N, all, numbers such as 7,8, or a site pattern.")
]
_Decisions = Annotated[
    int, typer.Option(help="Tokens of the prompt's end whose routing is changed.", min=1)
]
_Scored = Annotated[
    bool,
    typer.Option("--scored", help="Change the routing of the options' tokens too."),
]
_K = Annotated[int, typer.Option("--k", help="Neighbors of a question.", min=0)]
_Neighbors = Annotated[
    list[str] | None,
    typer.Option(
        help="More on neighbors: radius=0.5, kernel=matern, metric=cosine, …",
        metavar="KEY=VALUE",
        show_default=False,
    ),
]
_Gate = Annotated[
    list[str] | None,
    typer.Option(
        help="Leave questions alone beyond max_margin=…, max_distance=… or min_agreement=…",
        metavar="KEY=VALUE",
        show_default=False,
    ),
]
_Style = Annotated[
    Literal["text", "letters"],
    typer.Option(help="Score the options' own texts, or letters of options in the prompt."),
]
_Units = Annotated[
    Literal["none", "tokens", "characters"],
    typer.Option(help="What an option's log-probability is divided by."),
]
_Permute = Annotated[
    bool, typer.Option(help="In style letters, average over all cyclic shifts of the options.")
]
_Limit = Annotated[
    int | None, typer.Option(help="Questions, drawn with the seed.", min=1, show_default=False)
]
_ReferenceLimit = Annotated[
    int | None, typer.Option(help="References, drawn likewise.", min=1, show_default=False)
]
_Out = Annotated[
    Path | None, typer.Option(help="Results folder; its files are replaced.", show_default=False)
]
_Interventions = Annotated[
    bool,
    typer.Option(
        "--interventions",
        help="Write each method's routing as interventions on a batch of all prompts, in the order "
        "of the task.",
    ),
]
_Report = Annotated[bool, typer.Option(help="Write report.html, with --out.")]
_Restart = Annotated[
    bool, typer.Option("--restart", help="Discard what an unfinished run left in --out.")
]
_Text = Annotated[bool, typer.Option("--text", help="Keep questions in what is written.")]
_BatchSize = Annotated[int, typer.Option(help="Questions per batch.", min=1)]
_Seed = Annotated[int, typer.Option(help="Of draws, shifts and controls.")]
_Dtype = Annotated[Dtype, typer.Option(help="Of the weights; auto: as stored.")]
_Device = Annotated[str, typer.Option(help="cpu, cuda, …; auto takes an accelerator.")]
_DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check all inputs; load no weights, write nothing.")
]


def optimize(
    ctx: typer.Context,
    model: _Model,
    task: _Task,
    reference: _Reference,
    method: _Method = "ngd",
    set_: _Set = None,
    against: _Against = None,
    controls: _Controls = True,
    adapters: _Adapters = None,
    router: _Router = "pooled",
    layers: _Layers = "last 5",
    decisions: _Decisions = 1,
    scored: _Scored = False,
    k: _K = 3,
    neighbors: _Neighbors = None,
    gate: _Gate = None,
    style: _Style = "text",
    units: _Units = "none",
    permute: _Permute = True,
    limit: _Limit = None,
    reference_limit: _ReferenceLimit = None,
    out: _Out = None,
    interventions: _Interventions = False,
    report: _Report = True,
    restart: _Restart = False,
    text: _Text = False,
    batch_size: _BatchSize = 16,
    seed: _Seed = 0,
    dtype: _Dtype = "auto",
    device: _Device = "auto",
    dry_run: _DryRun = False,
) -> None:
    """Re-mix the routing of each question after similar ones that were solved.

    Runs the base, the method, its rivals and its controls on the same
    questions and compares them, with intervals and tests. With --out, writes
    results.parquet, results.json and report.html; a run that was killed goes
    on where it stopped when it is called again.
    """
    from expertmix.study.optimize_job import run_optimize
    from expertmix.study.optimize_plan import plan_optimize
    from expertmix.study.optimize_settings import OptimizeJob

    screen: Screen = ctx.obj
    job = OptimizeJob(
        model=model,
        task=task,
        reference=reference,
        method=method,
        settings=tuple(set_ or ()),
        against=tuple(against or ()),
        controls=controls,
        adapters=adapters,
        router=router,
        layers=layers,
        decisions=decisions,
        scored=scored,
        k=k,
        near=tuple(neighbors or ()),
        gate=tuple(gate or ()),
        style=style,
        units=units,
        permute=permute,
        limit=limit,
        reference_limit=reference_limit,
        out=out,
        interventions=interventions,
        report=report,
        restart=restart,
        text=text,
        batch_size=batch_size,
        seed=seed,
        dtype=dtype,
        device=device,
    )
    if dry_run:
        with screen.progress() as progress:
            plan = plan_optimize(job, progress)
        _show_plan(screen, plan)
    else:
        with screen.progress() as progress:
            done = run_optimize(job, progress)
        _show_result(screen, done)


def _show_plan(screen: Screen, plan: OptimizePlan) -> None:
    from expertmix.report import words

    found = plan.figures()
    screen.emit(found)
    known = "a reference set" if plan.reference is None else words.counted(
        len(plan.reference.items), "solved question"
    )  # fmt: skip
    _show_left_out(screen, found)
    screen.show(
        f"{found['architecture']}, critical sites: "
        f"{words.listed([str(info.site) for info in plan.sites])}",
        f"{words.counted(len(plan.task.items), 'question')}, asked "
        f"{words.counted(len(plan.task.asked), 'time')}, in style {plan.job.style}; {known}",
        f"would run {'; '.join(one.name for one in plan.contestants)}",
        f"would write {', '.join(plan.files)} to {plan.job.out}"
        if plan.job.out
        else "would write nothing; --out names a folder",
    )


def _show_left_out(screen: Screen, found: dict[str, object]) -> None:
    from expertmix.report import words

    for key, noun in (("left_out", "question"), ("references_left_out", "reference")):
        left = found[key]
        if isinstance(left, list) and left:
            screen.show(f"{words.counted(len(left), noun)} left out: {left[0]}, …")


def _show_result(screen: Screen, done: OptimizeResult) -> None:
    from expertmix.report import words
    from expertmix.report.terminal import data_table

    found = done.figures
    screen.emit(found)
    _show_left_out(screen, found)
    if done.resumed:
        screen.show(f"went on behind {words.counted(done.resumed, 'answer')} of an unfinished run")
    screen.show(
        f"references: {found['references_kept']} of {found['references_tried']} were answered right"
    )
    if not found["exact_suffix"]:
        screen.show("the exact suffix does not fit this model: every step was a full pass")
    for table in done.tables:
        screen.show(data_table(table), table.note)
    screen.show(*done.said)
    if done.folder is not None:
        for name in found["files"]:
            screen.show(f"wrote {done.folder / name}")
