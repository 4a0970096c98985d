"""Train a model and write a results folder: `run_train`.

The folder holds `model` (or `adapter`), `metrics.jsonl`, `train.lock.yaml` (what was asked for, and
of what) and, at the end, `summary.json`. While the run goes on it also holds checkpoints; a run
that was killed goes on from the last whole one and ends with the same weights as one that was not.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from expertmix.core.partial import output_errors, write_whole
from expertmix.core.progress import Progress, quiet
from expertmix.errors import ConfigError, OutputError
from expertmix.study import figures
from expertmix.study.outputs import as_json
from expertmix.study.train_arguments import arguments, on_processor, sharded
from expertmix.study.train_blocks import Blocks
from expertmix.study.train_checkpoint import Found, discard, last_good, remove, write_errors
from expertmix.study.train_metrics import MetricsFile, Tell, read_metrics, silent
from expertmix.study.train_model import open_model, shard_model
from expertmix.study.train_parts import select
from expertmix.study.train_plan import TrainPlan, plan_train
from expertmix.study.train_processes import is_first, meet, wait
from expertmix.study.train_settings import TrainSettings
from expertmix.study.train_trainer import ExpertTrainer

LOCK = "train.lock.yaml"
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a run gave.

    Attributes:
        folder: Where everything is.
        saved: The folder of the model, or of the adapter.
        figures: The content of summary.json.
        again: Whether it had been finished before, and nothing was done.
    """

    folder: Path
    saved: Path
    figures: dict[str, Any]
    again: bool = False


def run_train(
    settings: TrainSettings,
    progress: Progress = quiet,
    tell: Tell = silent,
    *,
    restart: bool = False,
) -> TrainResult:
    """Do the job, or what is left of it.

    Args:
        settings: What to do.
        progress: Told how far it is.
        tell: Told each line of metrics.jsonl as it comes.
        restart: Discard what an earlier run left in the folder.

    Raises:
        ConfigError: The folder holds a run with other settings; or what `plan_train` finds.
        ModelError: The loss or the gradient became infinite or no number.
        OutputError: The folder cannot be written.
    """
    if not is_first():
        progress = quiet
    plan = plan_train(settings, progress)
    meet(processor=on_processor(settings))
    out = settings.out
    saved = out / ("adapter" if settings.what == "lora" else "model")
    if restart and is_first():
        _clear(out)
    wait()
    _check_same(plan)
    done = _summary(out)
    if done is not None and saved.is_dir():
        return TrainResult(out, saved, done, again=True)
    found = last_good(out)
    wait()
    if is_first():
        _begin(plan, found)
    start = time.perf_counter()
    trainer = _trainer(plan, found, progress, tell)
    trainer.run(found.folder)
    _deliver(trainer, saved)
    content = _figures(plan, found, time.perf_counter() - start)
    if is_first():
        write_whole(out / SUMMARY, f"{as_json(content)}\n".encode())
    return TrainResult(out, saved, content)


def _check_same(plan: TrainPlan) -> None:
    """Refuse to go on with what other settings began."""
    lock = plan.settings.out / LOCK
    try:
        found = yaml.safe_load(lock.read_text(encoding="utf-8"))["identity"]
    except FileNotFoundError:
        return
    except (OSError, yaml.YAMLError, KeyError, TypeError) as problem:
        raise OutputError(
            f"{lock} is not what an earlier run left: choose another out, or discard it with "
            f"--restart"
        ) from problem
    wanted = json.loads(json.dumps(plan.identity()))
    keys = [key for key in {**wanted, **found} if found.get(key) != wanted.get(key)]
    if keys:
        other = "; ".join(
            f"{key} was {found.get(key)!r:.60}, is {wanted.get(key)!r:.60}" for key in keys[:3]
        )
        raise ConfigError(
            f"{plan.settings.out} holds a run with other settings: {other}. Repeat its settings to "
            f"go on with it, choose another out, or discard it with --restart"
        )


def _summary(out: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((out / SUMMARY).read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _clear(out: Path) -> None:
    for name in (SUMMARY, LOCK, METRICS):
        with output_errors(out / name):
            (out / name).unlink(missing_ok=True)
    for folder in [*out.glob("checkpoint-*"), out / "model", out / "adapter"]:
        remove(folder)


def _begin(plan: TrainPlan, found: Found) -> None:
    out = plan.settings.out
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file: name a folder for the results")
    lock = yaml.safe_dump(plan.lock(), sort_keys=False, allow_unicode=True)
    write_whole(out / LOCK, lock.encode())
    discard(out, found)


def _trainer(plan: TrainPlan, found: Found, progress: Progress, tell: Tell) -> ExpertTrainer:
    settings, rhythm = plan.settings, plan.rhythm
    adapted = settings.what == "lora"
    model = open_model(
        settings, plan.config, at=None if adapted else found.folder, progress=progress
    )
    distributed = sharded(settings)
    if distributed is not None:
        model = shard_model(model, settings.out / ".start", distributed, settings)
    model = select(model, settings.what, settings.lora)
    file = MetricsFile(settings.out / METRICS, found.step) if is_first() else None

    def told(line: Any) -> None:
        assert file is not None, "only the first process tells"
        file.append(line)
        tell(line)

    progress("training", found.step, rhythm.steps)
    rows = rhythm.steps * settings.batch_size
    return ExpertTrainer(
        model,
        arguments(plan),
        rhythm,
        Blocks(plan.training, plan.pad, seed=settings.seed, rows=rows),
        Blocks(plan.validation, plan.pad),
        plan.tokenizer,
        bias_rate=settings.bias_rate,
        tell=told,
        moved=lambda step: progress("training", step, rhythm.steps),
    )


def _deliver(trainer: ExpertTrainer, saved: Path) -> None:
    """The model, whole or not at all."""
    partial = saved.with_name(f".{saved.name}.partial")
    if is_first():
        shutil.rmtree(partial, ignore_errors=True)
    wait()
    with write_errors(saved):
        trainer.save_model(str(partial))
        wait()
        if is_first():
            (partial / "training_args.bin").unlink(missing_ok=True)
            shutil.rmtree(saved, ignore_errors=True)
            partial.replace(saved)
    wait()


def _figures(plan: TrainPlan, found: Found, seconds: float) -> dict[str, Any]:
    lines = read_metrics(plan.settings.out / METRICS)
    losses = [line for line in lines if "loss" in line]
    evaluations = [line["eval_loss"] for line in lines if "eval_loss" in line]
    return plan.figures() | {
        "notices": [*plan.notices, *found.notices],
        "resumed_from": found.step or None,
        "loss": losses[-1]["loss"] if losses else None,
        "eval_loss": evaluations[-1] if evaluations else None,
        "routing": losses[-1]["routing"] if losses else [],
        "seconds": figures.number(seconds),
        "machine": figures.machine(),
        "versions": figures.versions(),
    }
