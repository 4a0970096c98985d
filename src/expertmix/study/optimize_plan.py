"""What `expertmix optimize` is asked to do, checked before any weights are read."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from expertmix.bindings.critical import critical_sites
from expertmix.core.progress import Progress, quiet
from expertmix.core.site import SiteInfo
from expertmix.errors import ConfigError
from expertmix.optimize.reference_folder import MANIFEST
from expertmix.routers.router import Router
from expertmix.study import figures
from expertmix.study.adapters import Composition, look
from expertmix.study.choice import Item, LeftOut, sift
from expertmix.study.choice_prompts import Asked, ask, ask_references
from expertmix.study.choice_sets import open_items
from expertmix.study.contestants import Contestant, contestants
from expertmix.study.loading import Outline, outline
from expertmix.study.optimize_settings import ROUTER, OptimizeJob
from expertmix.study.settings import RouterSpec

_SETTINGS = ("layers", "decisions", "scored", "batch_size", "seed", "dtype", "interventions")
"""Of a job, those that decide what comes out and stand nowhere else in its identity."""


@dataclass(frozen=True, eq=False, slots=True)
class Known:
    """Questions whose answers are known, as text and as tokens.

    Attributes:
        items: As text.
        asked: As tokens.
        left: Those that are not asked.
    """

    items: tuple[Item, ...]
    asked: tuple[Asked, ...]
    left: tuple[LeftOut, ...]


@dataclass(frozen=True, eq=False, slots=True)
class OptimizePlan:
    """A job whose inputs have all been checked; no weights were read.

    Attributes:
        job: The job.
        architecture: Class of the model.
        sites: The critical ones.
        context: Tokens that it reads.
        tokenizer: Its tokenizer.
        task: The questions.
        reference: Those to learn from; None where the job names a folder of them.
        contestants: All that will be run, the base first.
        composition: Base and adapters, where adapters are composed.
        router: Of the adapters.
    """

    job: OptimizeJob
    architecture: str
    sites: tuple[SiteInfo, ...]
    context: int | None
    tokenizer: Any
    task: Known
    reference: Known | None
    contestants: tuple[Contestant, ...]
    composition: Composition | None
    router: Router | None

    @property
    def files(self) -> list[str]:
        """What will be written."""
        if self.job.out is None:
            return []
        edits = [f"interventions-{one.file}.json" for one in self.contestants if one.edits]
        page = ["report.html"] if self.job.report else []
        return [
            "results.parquet",
            "results.json",
            *page,
            *(edits if self.job.interventions else []),
        ]

    def figures(self) -> dict[str, Any]:
        """JSON-ready."""
        job = self.job
        return {
            "model": job.model,
            "architecture": self.architecture,
            "adapters": job.adapters,
            "router": None if self.router is None else repr(self.router),
            "sites": figures.site_list(self.sites),
            "layers": job.layers,
            "decisions": job.decisions,
            "scored": job.scored,
            "task": job.task,
            "items": len(self.task.items),
            "asked": len(self.task.asked),
            "left_out": [str(one) for one in self.task.left],
            "merged": sum(one.merged for one in self.task.asked),
            "reference": job.reference,
            "references": None if self.reference is None else len(self.reference.items),
            "references_left_out": []
            if self.reference is None
            else [str(one) for one in self.reference.left],
            "style": job.style,
            "units": job.units,
            "orders": "every cyclic shift" if job.permute and job.style == "letters" else "one",
            "neighbors": asdict(job.neighbors),
            "gate": asdict(job.keeping),
            "seed": job.seed,
            "batch_size": job.batch_size,
            "routings": [one.figures() for one in self.contestants],
            "files": self.files,
        }

    def identity(self, fingerprint: str) -> dict[str, Any]:
        """What decides what comes out: rows of runs that differ in it are never mixed.

        Args:
            fingerprint: Of the model.
        """
        job = self.job
        return {
            "model": fingerprint,
            "task": _digest(self.task),
            "reference": _set_digest(job.reference)
            if self.reference is None
            else _digest(self.reference),
            "routings": [one.line for one in self.contestants],
            **{name: getattr(job, name) for name in _SETTINGS},
            "neighbors": asdict(job.neighbors),
            "gate": asdict(job.keeping),
        }


def plan_optimize(job: OptimizeJob, progress: Progress = quiet) -> OptimizePlan:
    """Check everything that can be checked without the weights.

    Raises:
        ConfigError: A file, a method or a setting is wrong, or an item is broken.
        ModelError: The model cannot be used, or an item is too long for it.
    """
    _check_sizes(job)
    _ = job.neighbors, job.keeping, job.asking  # refused here, before anything is read
    runs = contestants(job.main, job.against, controls=job.controls, seed=job.seed)
    items, left = sift(open_items(job.task, progress))
    folder = Path(job.reference).is_dir()
    if folder:
        _set_digest(job.reference)
    known = ([], []) if folder else sift(open_items(job.reference, progress))
    router = _router(job)
    composition = _composition(job, progress)
    if composition is None:
        model: Outline | Any = outline(job.model, progress)
        architecture, sites = model.architecture, model.sites
    else:
        assert router is not None, "adapters have a router"
        model = composition.base
        architecture, sites = model.architecture, composition.sites(router)
    critical = critical_sites(sites, job.where)
    chosen = drawn(items, job.limit, job.seed)
    asked = ask(chosen, model.tokenizer, job.asking, context=model.context)
    reference = None if folder else _references(job, known, model)
    free = any(item.free for item in chosen)
    return OptimizePlan(
        job, architecture, critical, model.context, model.tokenizer,
        Known(tuple(chosen), tuple(asked), tuple(left)), reference,
        tuple(one for one in runs if not (free and one.chooses)), composition, router,
    )  # fmt: skip


def drawn(items: Sequence[Item], limit: int | None, seed: int) -> list[Item]:
    """So many items, drawn with a seed, in their own order.

    Public sets are sorted by source, so their first items are no fair sample.

    Raises:
        ConfigError: A limit below one.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"a limit must be at least 1, not {limit}")
    if limit is None or limit >= len(items):
        return list(items)
    numbers = sorted(random.Random(f"{seed} items").sample(range(len(items)), limit))
    return [items[number] for number in numbers]


def _references(job: OptimizeJob, known: tuple[list[Item], list[LeftOut]], model: Any) -> Known:
    chosen = drawn(known[0], job.reference_limit, job.seed)
    asked = ask_references(
        chosen, model.tokenizer, job.asking, seed=job.seed, context=model.context
    )
    return Known(tuple(chosen), tuple(asked), tuple(known[1]))


def _router(job: OptimizeJob) -> Router | None:
    if job.adapters is None:
        if job.router != ROUTER:
            raise ConfigError("--router is of adapters, and there are none: name --adapters too")
        return None
    made = RouterSpec.parse(job.router).make([])
    if made is None:
        raise ConfigError("--router base composes nothing: choose a router, or leave out adapters")
    return made


def _composition(job: OptimizeJob, progress: Progress) -> Composition | None:
    return None if job.adapters is None else look(job.model, job.adapters, progress=progress)


def _check_sizes(job: OptimizeJob) -> None:
    for name in ("decisions", "batch_size"):
        if getattr(job, name) < 1:
            raise ConfigError(f"{name} must be at least 1, not {getattr(job, name)}")


def _set_digest(folder: str) -> str:
    """Of a reference set that is there.

    Raises:
        ConfigError: The folder holds none.
    """
    try:
        manifest = (Path(folder) / MANIFEST).read_bytes()
    except OSError as problem:
        raise ConfigError(
            f"{folder} holds no finished reference set: it has no {MANIFEST}. Name a folder that "
            f"`em.references(…, to=…)` wrote, or the reference-… folder of an earlier run's --out"
        ) from problem
    return hashlib.sha256(manifest).hexdigest()[:16]


def _digest(known: Known) -> str:
    digest = hashlib.sha256()
    for one in known.asked:
        digest.update(repr((one.sample.name, one.sample.question, one.sample.gold)).encode())
        digest.update(repr(one.sample.units).encode())
    return digest.hexdigest()[:16]
