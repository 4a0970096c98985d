"""`expertmix train`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from expertmix.cli.screen import Screen

if TYPE_CHECKING:
    from expertmix.study.train_job import TrainResult
    from expertmix.study.train_plan import TrainPlan


def train(
    ctx: typer.Context,
    config: Annotated[
        Path,
        typer.Argument(help="A YAML: see docs/train.md.", metavar="CONFIG", show_default=False),
    ],
    restart: Annotated[
        bool, typer.Option("--restart", help="Discard what an earlier run left in its folder.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check all inputs; load no weights, write nothing.")
    ] = False,
) -> None:
    """Train a mixture or chain of experts, or its routers, experts or adapters.

    Writes the model, metrics.jsonl, train.lock.yaml and summary.json. A run
    that was killed goes on exactly where its last checkpoint stands when it
    is called again.
    """
    from expertmix.study.train_job import run_train
    from expertmix.study.train_plan import plan_train
    from expertmix.study.train_processes import is_first
    from expertmix.study.train_settings import load_settings

    screen: Screen = ctx.obj
    settings = load_settings(config)
    if dry_run:
        with screen.progress() as progress:
            plan = plan_train(settings, progress)
        _show_plan(screen, plan)
        return
    with screen.progress() as progress:
        done = run_train(settings, progress, lambda line: _show_line(screen, line), restart=restart)
    if is_first():
        _show_result(screen, done)


def _show_line(screen: Screen, line: Mapping[str, Any]) -> None:
    if not screen.as_json:
        screen.say(words_of(line))


def words_of(line: Mapping[str, Any]) -> str:
    """A line of metrics.jsonl for people."""
    if "eval_loss" in line:
        return f"step {line['step']:>6}  validation loss {line['eval_loss']:.4f}"
    said = (
        f"step {line['step']:>6}  loss {line['loss']:.4f}  "
        f"{line['tokens_per_second']:,.0f} tokens/s  lr {line['learning_rate']:.2e}  "
        f"gradient {line['grad_norm']:.2f}"
    )
    return said + _routing(line["routing"])


def _routing(sites: list[Mapping[str, Any]]) -> str:
    if not sites:
        return ""
    worst = max(site["load_max_over_mean"] for site in sites)
    dead, experts = (sum(len(site[key]) for site in sites) for key in ("dead", "load"))
    kept = [site["retention"] for site in sites if site["retention"] is not None]
    said = f"  busiest expert {worst:.1f}\u00d7 mean"
    if kept:
        said += f"  routes kept {100 * sum(kept) / len(kept):.0f}%"
    return f"{said}  dead {dead} of {experts}" if dead else said


def _show_plan(screen: Screen, plan: TrainPlan) -> None:
    from expertmix.report import words

    found = plan.figures()
    screen.emit(found)
    for notice in plan.notices:
        screen.show(f"note: {notice}")
    screen.show(
        f"{plan.architecture}, {words.counted(plan.parameters, 'parameter')}, of which "
        f"{words.count(plan.trainable)} are trained ({plan.settings.what})",
        f"{words.counted(plan.documents[0], 'document')} in "
        f"{words.counted(len(plan.training), 'block')} of {plan.settings.sequence_length} tokens; "
        f"{words.counted(plan.documents[1], 'document')} to validate",
        f"would train {words.counted(plan.steps, 'step')}: {words.count(found['tokens'])} tokens, "
        f"{found['epochs']:g} times the data",
        f"would write to {plan.settings.out}",
    )


def _show_result(screen: Screen, done: TrainResult) -> None:
    found = done.figures
    screen.emit(found)
    for notice in found["notices"]:
        screen.show(f"note: {notice}")
    if done.again:
        screen.show(f"{done.folder} is finished; --restart trains it anew")
    elif found["resumed_from"]:
        screen.show(f"went on from step {found['resumed_from']}")
    for name, key in (("loss", "loss"), ("validation loss", "eval_loss")):
        if found[key] is not None:
            screen.show(f"{name} {found[key]:.4f}")
    screen.show(f"wrote {done.saved}")
    if done.saved.name == "model" and found["routing"]:
        screen.show(f"next: expertmix trace {done.saved} --prompts FILE.txt --out FOLDER")
    elif done.saved.name == "adapter":
        screen.show(f"next: put {done.saved} beside other adapters, and expertmix compose them")
