"""How a benchmark is run and kept: its options, its `name: value` lines, its dated result file."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable, Iterable
from datetime import date
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
Figures = Iterable[tuple[str, float]]


def run(name: str, description: str | None, quick: str, measure: Callable[[bool], Figures]) -> None:
    """Read the command line, measure on one thread, print every figure at once, keep all on demand.

    Args:
        name: Of the result file.
        description: For --help.
        quick: What --quick leaves out.
        measure: Told whether to be quick; gives figures in the order in which they are printed.
    """
    show(name, parser(description, quick).parse_args(), lambda options: measure(options.quick))


def parser(description: str | None, quick: str) -> argparse.ArgumentParser:
    """The options of every benchmark; one may add its own."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--quick", action="store_true", help=f"{quick}, under a minute")
    made.add_argument("--save", action="store_true", help="write a dated file to results/")
    return made


def show(
    name: str, options: argparse.Namespace, measure: Callable[[argparse.Namespace], Figures]
) -> None:
    """`run` with options that were read already."""
    torch.set_num_threads(1)
    lines = []
    for figure, value in measure(options):
        lines.append(f"{figure}: {value:.4g}")
        print(lines[-1], flush=True)
    if options.save:
        _save(name, lines)


def _save(name: str, lines: list[str]) -> None:
    """Keep the figures with date and hardware."""
    RESULTS.mkdir(exist_ok=True)
    day = date.today().isoformat()
    head = f"# {day}, {platform.machine()}, one thread, torch {torch.__version__}\n# {_processor()}"
    path = RESULTS / f"{name}-{day}.txt"
    path.write_text("\n".join([head, *lines]) + "\n", encoding="utf-8")


def _processor() -> str:
    """Name of the CPU."""
    info = Path("/proc/cpuinfo")
    rows = info.read_text().splitlines() if info.exists() else []
    names = (row.split(":")[1].strip() for row in rows if "model name" in row)
    return next(names, platform.processor())
