"""Which conversion is asked for: adapters to a MoE, a MoE to a chain, or a chain back to a MoE.

Knows options and what each is for; does no work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from expertmix.core.progress import Progress
from expertmix.errors import ConfigError
from expertmix.study.convert_chain_job import ChainJob, plan_chain, run_chain
from expertmix.study.convert_job import ConvertJob, plan_convert, run_convert


class Plan(Protocol):
    """A conversion whose inputs have been checked."""

    def figures(self) -> dict[str, Any]:
        """JSON-ready; `bytes` is the size of what is written."""

    def summary(self) -> str:
        """A line for people."""


@dataclass(frozen=True, slots=True)
class Work:
    """A conversion to look at, or to do.

    Attributes:
        plan: Checks its inputs.
        run: Does it.
    """

    plan: Callable[[Progress], Plan]
    run: Callable[[Progress], Plan]


def chosen(
    *,
    model: str,
    library: str | None,
    out: Path,
    to: Literal["moe", "coe"],
    texts: Path | None,
    router: str | None,
    top_k: int | None,
    iterations: int | None,
    first_iteration_only: bool,
) -> Work:
    """The conversion that options ask for; those left at None have their defaults.

    Raises:
        ConfigError: An option that is for another conversion.
    """
    adapters = {"--texts": texts, "--router": router, "--top-k": top_k}
    if to == "coe":
        if library is not None:
            raise ConfigError(
                f"--to coe takes a MoE and no library ({library}): make the MoE first, with "
                f"--to moe, then a chain of it"
            )
        _refuse(adapters, "a library of adapters")
        _refuse({"--first-iteration-only": first_iteration_only}, "--to moe")
        return _chain(model, out, to, iterations=2 if iterations is None else iterations)
    _refuse({"--iterations": iterations}, "--to coe")
    if library is None:
        _refuse(adapters, "a library of adapters")
        return _chain(model, out, to, first_iteration_only=first_iteration_only)
    _refuse({"--first-iteration-only": first_iteration_only}, "a CoE, without a library")
    job = ConvertJob(
        base=model, library=library, out=out, texts=texts,
        router=router or "logistic", top_k=2 if top_k is None else top_k,
    )  # fmt: skip
    return Work(partial(plan_convert, job), partial(run_convert, job))


def _chain(
    model: str,
    out: Path,
    to: Literal["moe", "coe"],
    *,
    iterations: int = 2,
    first_iteration_only: bool = False,
) -> Work:
    job = ChainJob(
        model=model, out=out, to=to, iterations=iterations,
        first_iteration_only=first_iteration_only,
    )  # fmt: skip
    return Work(partial(plan_chain, job), partial(run_chain, job))


def _refuse(options: dict[str, Any], needed: str) -> None:
    for name, value in options.items():
        if value is not None and value is not False:
            raise ConfigError(f"{name} goes with {needed}: leave it out, or add that")
