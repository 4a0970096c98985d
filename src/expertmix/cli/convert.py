"""`expertmix convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from expertmix.cli.screen import Screen


def convert(
    ctx: typer.Context,
    base: Annotated[
        str,
        typer.Argument(help="Llama or Mistral: hub id, folder, or default.", show_default=False),
    ],
    library: Annotated[
        str, typer.Argument(help="Folder of LoRA adapters, or default.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="New folder for the MoE.", show_default=False)],
    texts: Annotated[
        Path | None,
        typer.Option(
            help=".jsonl with text and label, the adapter's name: what routers are fitted to.",
            show_default=False,
        ),
    ] = None,
    router: Annotated[
        str, typer.Option(help="logistic, ridge, random, or a file of routers.")
    ] = "logistic",
    top_k: Annotated[int, typer.Option(help="Experts per token.", min=1)] = 2,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check all inputs; write nothing.")
    ] = False,
) -> None:
    """Make a mixture of experts of a dense model and its LoRA adapters.

    Each adapter on the MLPs becomes an expert, beside the unchanged base. The
    result has Mixtral's architecture and opens in transformers, vLLM, others.
    """
    from expertmix.study.convert_job import ConvertJob, plan_convert, run_convert

    screen: Screen = ctx.obj
    job = ConvertJob(base=base, library=library, out=out, texts=texts, router=router, top_k=top_k)
    with screen.progress() as progress:
        plan = plan_convert(job, progress) if dry_run else run_convert(job, progress)
    screen.emit(plan.figures())
    screen.show(
        f"{len(plan.experts)} experts, {top_k} per token: {', '.join(plan.experts)}",
        f"{'would write' if dry_run else 'wrote'} {plan.bytes / 1e6:,.0f} MB to {out}",
    )
    if not dry_run:
        screen.show(f"next: expertmix models {out}")
