"""Base and adapters made into a MoE: `ConvertJob`, its plan, and its doing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expertmix.core.progress import Progress, quiet
from expertmix.errors import ConfigError
from expertmix.models.checkpoint import Checkpoint
from expertmix.models.default import ROUTERS
from expertmix.models.fitting import METHODS, load_routers
from expertmix.models.folders import check_free, check_room
from expertmix.models.library import Library, default_library
from expertmix.models.mixtral import check_adapters, check_base, expert_names
from expertmix.models.upcycle import upcycle
from expertmix.study.loading import locate
from expertmix.study.names import DEFAULT
from expertmix.study.prompts import Prompt, read_prompts


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertJob:
    """What to make.

    Attributes:
        base: Folder or hub id of a Llama or Mistral model, or `default`.
        library: Folder of LoRA adapters, or `default`.
        out: Folder that does not exist yet, or is empty.
        texts: A .jsonl file whose labels are names of experts, to fit the routers to.
        router: `logistic`, `ridge`, `random`, or a file of routers.
        top_k: Experts per token.
    """

    base: str
    library: str
    out: Path
    texts: Path | None = None
    router: str = "logistic"
    top_k: int = 2


@dataclass(frozen=True, eq=False, slots=True)
class ConvertPlan:
    """A job whose inputs have all been checked; nothing was computed or written.

    Attributes:
        job: The job.
        checkpoint: The base.
        library: The adapters.
        texts: Expert -> texts, or None where no router is fitted.
        router: What `upcycle` is to use.
        experts: Names of the experts to be, in order.
        bytes: Size of the weights to be written, about.
    """

    job: ConvertJob
    checkpoint: Checkpoint
    library: Library
    texts: dict[str, list[str]] | None
    router: str | Path
    experts: tuple[str, ...]
    bytes: int

    def figures(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "command": "convert",
            "base": self.checkpoint.name,
            "experts": list(self.experts),
            "top_k": self.job.top_k,
            "router": "shipped" if self.router == ROUTERS else Path(self.router).name,
            "texts": None if self.texts is None else {k: len(v) for k, v in self.texts.items()},
            "bytes": self.bytes,
        }

    def summary(self) -> str:
        """A line for people."""
        names = ", ".join(self.experts)
        return f"{len(self.experts)} experts, {self.job.top_k} per token: {names}"


def plan_convert(job: ConvertJob, progress: Progress = quiet) -> ConvertPlan:
    """Check everything before any work.

    Raises:
        OutputError: Something is in the way, or the disk has no room.
        CheckpointError: Base or adapters are missing, broken or do not fit each other.
        UnsupportedModelError: A base that cannot be repeated exactly.
        ConfigError: Texts, router or top_k do not fit the experts.
    """
    check_free(job.out)
    checkpoint = Checkpoint.open(locate(job.base, progress))
    check_base(checkpoint, checkpoint.config())
    library = default_library() if job.library == DEFAULT else Library.open(job.library)
    check_adapters(checkpoint, library)
    experts = expert_names(library)
    router = _router(job, experts)
    texts = _texts(job.texts, experts) if job.texts else None
    if not 1 <= job.top_k <= len(experts):
        raise ConfigError(f"top_k must be between 1 and {len(experts)} experts, not {job.top_k}")
    size = _size(checkpoint, len(experts))
    check_room(job.out, size)
    return ConvertPlan(job, checkpoint, library, texts, router, experts, size)


def run_convert(job: ConvertJob, progress: Progress = quiet) -> ConvertPlan:
    """Do the job; the folder appears whole at the end, or not at all.

    Raises:
        ExpertmixError: Whatever `plan_convert` finds.
    """
    plan = plan_convert(job, progress)
    upcycle(
        plan.checkpoint.folder,
        plan.library,
        job.out,
        router=plan.router,
        texts=plan.texts,
        top_k=job.top_k,
        progress=progress,
    )
    return plan


def _router(job: ConvertJob, experts: tuple[str, ...]) -> str | Path:
    """The shipped routers for the shipped experts; otherwise texts are needed for a fit."""
    if job.router == "random" or (job.router in METHODS and job.texts is not None):
        return job.router
    file = ROUTERS if job.base == job.library == DEFAULT else Path(job.router)
    if job.router not in METHODS or file == ROUTERS:
        load_routers(file, experts)  # checks it; `upcycle` reads it again
        return file
    raise ConfigError(
        f"the {job.router} router is fitted to texts: give --texts FILE.jsonl with lines such as "
        f'{{"text": "…", "label": "name of an adapter"}}, a few per adapter; or --router random'
    )


def _texts(path: Path, experts: tuple[str, ...]) -> dict[str, list[str]]:
    texts: dict[str, list[str]] = {}
    for prompt in read_prompts(path):
        texts.setdefault(_expert(prompt, experts), []).append(prompt.text)
    return texts


def _expert(prompt: Prompt, experts: tuple[str, ...]) -> str:
    if prompt.label is None:
        raise ConfigError(f"{prompt.where}: no label; it says which expert the text is for")
    if prompt.label not in experts:
        raise ConfigError(
            f"{prompt.where}: no expert is named {prompt.label!r}; known: {', '.join(experts)}"
        )
    return prompt.label


def _size(checkpoint: Checkpoint, experts: int) -> int:
    """Bytes of the MoE's weights: every MLP tensor once per expert, in the base's type."""
    width = checkpoint.tensor("model.norm.weight").element_size()
    return sum(
        width * math.prod(checkpoint.shape(name)) * (experts if ".mlp." in name else 1)
        for name in checkpoint.files
    )
