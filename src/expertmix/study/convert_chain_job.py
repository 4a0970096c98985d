"""A MoE made into a Chain-of-Experts, and back: `ChainJob`, its plan, and its doing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from expertmix.core.progress import Progress, quiet
from expertmix.models.chain_conversion import Conversion, to_chain, to_moe
from expertmix.models.folders import check_free, check_room
from expertmix.study.loading import locate


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainJob:
    """What to make.

    Attributes:
        model: Folder or hub id of a MoE, or `default-moe`; of a CoE where it goes back.
        out: Folder that does not exist yet, or is empty.
        to: What to make.
        iterations: C of the CoE.
        first_iteration_only: On the way back, drop added iterations that compute something.
    """

    model: str
    out: Path
    to: Literal["coe", "moe"] = "coe"
    iterations: int = 2
    first_iteration_only: bool = False


@dataclass(frozen=True, eq=False, slots=True)
class ChainPlan:
    """A job whose inputs have all been checked; nothing was written.

    Attributes:
        job: The job.
        conversion: How to do it.
    """

    job: ChainJob
    conversion: Conversion

    def figures(self) -> dict[str, Any]:
        """JSON-ready."""
        chain = self.conversion.chain
        return {
            "command": "convert",
            "to": self.job.to,
            "model": self.conversion.checkpoint.name,
            "family": self.conversion.family,
            "iterations": chain.num_iterations,
            "layers": chain.num_hidden_layers - len(chain.dense_layers or ()),
            "experts": chain.num_experts,
            "top_k": chain.num_experts_per_tok,
            "bytes": self.conversion.size,
        }

    def summary(self) -> str:
        """A line for people."""
        found = self.figures()
        sizes = (
            f"{found['layers']} layers of {found['experts']} experts, {found['top_k']} per token"
        )
        if self.job.to == "moe":
            return f"{found['model']}, without added iterations, is a {found['family']}: {sizes}"
        added = _added(found["iterations"] - 1)
        return f"{found['model']} ({found['family']}) as a chain: {sizes}, {added}"


def _added(count: int) -> str:
    if count == 0:
        return "one iteration, as before"
    return f"{count} added iteration{'s' if count > 1 else ''} at scale 0: same logits"


def plan_chain(job: ChainJob, progress: Progress = quiet) -> ChainPlan:
    """Check everything before any work.

    Raises:
        OutputError: Something is in the way, or the disk has no room.
        CheckpointError: Files or tensors missing, broken or pickled.
        UnsupportedModelError: What cannot be repeated exactly, or cannot go back.
        ConfigError: Fewer than one iteration.
    """
    check_free(job.out)
    where = locate(job.model, progress)
    if job.to == "coe":
        conversion = to_chain(where, job.iterations)
    else:
        conversion = to_moe(where, first_iteration_only=job.first_iteration_only)
    check_room(job.out, conversion.size)
    return ChainPlan(job, conversion)


def run_chain(job: ChainJob, progress: Progress = quiet) -> ChainPlan:
    """Do the job; the folder appears whole at the end, or not at all.

    Raises:
        ExpertmixError: Whatever `plan_chain` finds.
    """
    plan = plan_chain(job, progress)
    plan.conversion.write(job.out, progress=progress)
    return plan
