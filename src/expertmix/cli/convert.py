"""`expertmix convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from expertmix.cli.screen import Screen

_LORA = "MoE of LoRA adapters"
_CHAIN = "Chain-of-Experts"


def convert(
    ctx: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            help="Hub id or folder. A Llama or Mistral (or default) with a LIBRARY; a MoE (or "
            "default-moe) for --to coe; a CoE for --to moe.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="New folder for the result.", show_default=False)],
    library: Annotated[
        str | None,
        typer.Argument(help="Folder of LoRA adapters, or default.", show_default=False),
    ] = None,
    to: Annotated[
        Literal["moe", "coe"], typer.Option(help="A mixture, or a chain, of experts.")
    ] = "moe",
    texts: Annotated[
        Path | None,
        typer.Option(
            help=".jsonl with text and label, the adapter's name: what routers are fitted to.",
            show_default=False,
            rich_help_panel=_LORA,
        ),
    ] = None,
    router: Annotated[
        str | None,
        typer.Option(
            help="logistic (the default), ridge, random, or a file of routers.",
            show_default=False,
            rich_help_panel=_LORA,
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            help="Experts per token; 2 by default.",
            min=1,
            show_default=False,
            rich_help_panel=_LORA,
        ),
    ] = None,
    iterations: Annotated[
        int | None,
        typer.Option(
            help="Of the chain; 2 by default. Added ones start at scale 0: same logits.",
            show_default=False,
            rich_help_panel=_CHAIN,
        ),
    ] = None,
    first_iteration_only: Annotated[
        bool,
        typer.Option(
            "--first-iteration-only",
            help="Back to a MoE: leave out what added iterations have learned.",
            rich_help_panel=_CHAIN,
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check all inputs; write nothing.")
    ] = False,
) -> None:
    """Make a MoE of a dense model and LoRA adapters, or a chain of a MoE, and back.

    With a LIBRARY, each adapter on the MLPs becomes an expert, beside the
    unchanged base. The result has Mixtral's architecture and opens in
    transformers, vLLM, others.

    --to coe makes a Chain-of-Experts of an OLMoE, Mixtral, Qwen2-MoE,
    Qwen3-MoE or DeepSeek-V2, with the same logits until it is trained.
    --to moe without a LIBRARY gives back what it was made of.
    """
    from expertmix.study.convert_choice import chosen

    screen: Screen = ctx.obj
    work = chosen(
        model=model, library=library, out=out, to=to, texts=texts, router=router, top_k=top_k,
        iterations=iterations, first_iteration_only=first_iteration_only,
    )  # fmt: skip
    with screen.progress() as progress:
        plan = work.plan(progress) if dry_run else work.run(progress)
    screen.emit(plan.figures())
    size = plan.figures()["bytes"]
    screen.show(
        plan.summary(),
        f"{'would write' if dry_run else 'wrote'} {size / 1e6:,.0f} MB to {out}",
    )
    if not dry_run:
        screen.show(f"next: expertmix models {out}")
