"""What C3PO is worth on questions: methods, rivals and controls, on test items nobody looked at.

Prints `name: value` lines: accuracy with Wilson's interval, flips both ways, McNemar's p against
the base, the change in choice loss with a paired bootstrap interval, and the cost over the base's
pass.

    python benchmarks/c3po_quality.py --data ../shared/data --out runs/c3po
                                      [--tasks arc_easy piqa hellaswag families] [--quick] [--save]

`arc_easy` learns from the training questions of OpenBookQA, `piqa` and `hellaswag` from SocialIQA
and CommonsenseQA, on the default MoE, its last five layers and the last prompt token; options are
scored per character. `families` are the generated questions of examples/train_choice_moe.py on the
model that it trains (--families names its folder): shifted ones, learned from unshifted ones.

A task that was finished is read from its folder in --out; one that was killed goes on. Of ARC-easy,
places 600 to 799 of the seeded shuffle were looked at while methods were built, and the development
file of the families; these figures come from places 0 to 299, and the test file.
"""

from __future__ import annotations

import argparse
import bz2
import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import figures

from expertmix.study.optimize_job import run_optimize
from expertmix.study.optimize_settings import OptimizeJob

ITEMS, REFERENCES = 300, 1500
METHODS = ("ngd", "kernel_regression", "mode_finding", "router_tuning")
TASKS: dict[str, tuple[str, ...]] = {
    "arc_easy": ("choice_train/openbook_qa.json",),
    "piqa": ("choice/siqa.jsonl", "choice/commonsense_qa.jsonl"),
    "hellaswag": ("choice/siqa.jsonl", "choice/commonsense_qa.jsonl"),
}
"""Where the references of a task of the default MoE come from."""


def rows(file: Path) -> list[Any]:
    """A list of JSON, or a line each; HellaSwag's own text as it is."""
    if file.suffix == ".json":
        found: list[Any] = json.loads(file.read_text(encoding="utf-8"))
        return found
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def shuffled(found: Sequence[Any], count: int) -> list[Any]:
    """The first of a seeded shuffle."""
    drawn = list(found)
    random.Random(0).shuffle(drawn)
    return drawn[:count]


def write(file: Path, found: Sequence[Any]) -> str:
    """As JSON lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{json.dumps(row)}\n" for row in found), encoding="utf-8")
    return str(file)


def asked(data: Path, task: str, out: Path, count: int) -> str:
    """The test items of a task, in a file."""
    if task == "hellaswag":
        source = data / "hellaswag" / "hellaswag_val_full.txt.bz2"
        lines = bz2.decompress(source.read_bytes()).decode().splitlines()
        items = [lines[at : at + 6] for at in range(0, len(lines) - 5, 6)]
        file = out / "hellaswag.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        text = "\n".join(line for item in shuffled(items, count) for line in item)
        file.write_text(f"{text}\n", encoding="utf-8")
        return str(file)
    found = rows(data / "choice" / f"{task}.jsonl")
    return write(out / f"{task}.jsonl", shuffled(found, count))


def learned(data: Path, task: str, out: Path, count: int) -> str:
    """The references of a task, in a file: as many of each source."""
    sources = TASKS[task]
    found = [row for name in sources for row in shuffled(rows(data / name), count // len(sources))]
    return write(out / f"{task}-references.jsonl", found)


def job(options: argparse.Namespace, task: str) -> OptimizeJob:
    """What is run."""
    out = options.out / ("quick" if options.quick else "full")
    items, known = (8, 60) if options.quick else (ITEMS, REFERENCES)
    methods = METHODS[:1] if options.quick else METHODS
    if task == "families":
        return OptimizeJob(
            model=str(options.families), task=str(options.families / "test.jsonl"),
            reference=str(options.families / "reference.jsonl"), method=methods[0],
            against=(*methods[1:], "leave_one_out", "context"),
            limit=items if options.quick else None, batch_size=32,
            out=out / task, dtype="float32",
        )  # fmt: skip
    return OptimizeJob(
        model="default-moe", task=asked(options.data, task, out, items),
        reference=learned(options.data, task, out, known), method=methods[0],
        against=methods[1:], units="characters", out=out / task, dtype="float32",
    )  # fmt: skip


def measure(options: argparse.Namespace) -> figures.Figures:
    """All figures, task by task."""
    for task in options.tasks:
        yield from task_figures(task, result(job(options, task)))


def result(wanted: OptimizeJob) -> dict[str, Any]:
    """The content of results.json: of a finished run, or of one that is run now."""
    assert wanted.out is not None
    file = wanted.out / "results.json"
    if not file.is_file():
        run_optimize(wanted, progress)
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def progress(stage: str, done: int, total: int) -> None:
    """To the error output: a line per batch."""
    print(f"{stage} {done}/{total}", file=sys.stderr, flush=True)


def task_figures(task: str, found: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Of one task."""
    yield f"{task}_items", found["items"]
    yield f"{task}_references_kept", found["references_kept"]
    for line in found["results"]:
        name = f"{task}_{line['method'].replace(', ', '_').replace(' ', '_')}"
        for key in ("accuracy", "loss_change"):
            for end, value in line[key].items():
                suffix = "" if end == "value" else f"_{end}"
                yield f"{name}_{key}{suffix}", _number(value)
        for key in ("wrong_to_right", "right_to_wrong", "mcnemar_p", "mcnemar_p_holm", "loss"):
            yield f"{name}_{key}", _number(line[key])
        yield f"{name}_over_base", _number(line["relative_cost"])


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


if __name__ == "__main__":
    parser = figures.parser(__doc__, "eight items, one method and its controls")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("runs/c3po"))
    parser.add_argument("--families", type=Path, default=Path("runs/choice-moe"))
    parser.add_argument("--tasks", nargs="+", choices=[*TASKS, "families"], default=[*TASKS])
    figures.show("c3po_quality", parser.parse_args(), measure)
