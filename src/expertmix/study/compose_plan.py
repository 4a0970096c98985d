"""What a composition is asked to do, checked before any weights are read: `ComposeJob`, `plan`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from expertmix.core.progress import Progress, quiet
from expertmix.core.site import SiteInfo
from expertmix.errors import ConfigError
from expertmix.experts.fused import Combination
from expertmix.routers.fixed import Fixed
from expertmix.routers.oracle import Oracle
from expertmix.routers.router import Router
from expertmix.routers.uniform import Uniform
from expertmix.study.adapters import Composition, look
from expertmix.study.corpus import Corpus, encode, encode_chat
from expertmix.study.generation import Decoding
from expertmix.study.names import Dtype
from expertmix.study.prompts import Prompt, read_prompts
from expertmix.study.settings import BASE, ORACLE, RouterSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class ComposeJob:
    """A base, a library of adapters, and prompts.

    Attributes:
        base: Hub id, folder or `default`.
        library: A folder of adapters, or `default`.
        prompts: A .txt or .jsonl file.
        router: `KIND`, or `KIND KEY=VALUE …`.
        settings: Further KEY=VALUE for it.
        combination: How outputs combine.
        calibrate: A file of unlabelled text that makes the router's scores comparable. Without it
            a router that needs such text has the base write some.
        any_base: Allow adapters whose config names another base.
        against: Routers to compare with, in the same form; `base` for the base alone.
        max_new_tokens: Length of an answer at most.
        temperature: 0 takes the most likely token.
        seed: Of drawing tokens.
        chat: Put prompts into the tokenizer's chat template.
        out: Results folder; its files are replaced. None writes nothing.
        text: Keep prompts and token strings in what is written.
        batch_size: Prompts per batch.
        dtype: Of the base's weights.
        device: Where to run.
        report: Write the page.
    """

    base: str
    library: str
    prompts: Path
    router: str = "pooled"
    settings: tuple[str, ...] = ()
    combination: Combination = "outputs"
    calibrate: Path | None = None
    any_base: bool = False
    against: tuple[str, ...] = ()
    max_new_tokens: int = 40
    temperature: float = 0.0
    seed: int = 0
    chat: bool = False
    out: Path | None = None
    text: bool = False
    batch_size: int = 8
    dtype: Dtype = "auto"
    device: str = "auto"
    report: bool = True

    @property
    def decoding(self) -> Decoding:
        """How tokens are chosen."""
        return Decoding(self.max_new_tokens, self.temperature, self.seed)

    @property
    def spec(self) -> RouterSpec:
        """The router that answers."""
        found = RouterSpec.parse(self.router)
        return replace(found, settings=(*found.settings, *self.settings))

    @property
    def main(self) -> str:
        """What it is called in tables."""
        return self.spec.name + (", calibrated" if self.calibrate else "")


@dataclass(frozen=True, eq=False, slots=True)
class ComposePlan:
    """A job whose inputs have all been checked.

    Attributes:
        job: The job.
        composition: Base and adapters.
        sites: Where the adapters act.
        prompts: As they were written.
        asked: The prompts as tokens, as the model is asked.
        texts: The prompts as texts to read.
        routers: By name, the main one first; None for the base alone. It is not calibrated yet.
        calibration: The text for that.
    """

    job: ComposeJob
    composition: Composition
    sites: tuple[SiteInfo, ...]
    prompts: tuple[Prompt, ...]
    asked: Corpus
    texts: Corpus
    routers: Mapping[str, Router | None]
    calibration: Corpus | None

    @property
    def main(self) -> Router:
        """The router that answers, not calibrated."""
        router = self.routers[self.job.main]
        assert router is not None, "the base alone composes nothing"
        return router

    @property
    def told(self) -> tuple[str, ...] | None:
        """For an oracle: the adapter of each prompt."""
        return self.main.adapters if isinstance(self.main, Oracle) else None

    @property
    def reads(self) -> bool:
        """Whether the prompts are also read: to compare routers, or labels with adapters."""
        named = set(self.texts.labels) & set(self.composition.shelf.names)
        return len(self.routers) > 1 or bool(named)

    @property
    def files(self) -> list[str]:
        """What will be written."""
        page = ["report.html"] if self.job.report else []
        return ["answers.jsonl", "trace.parquet", "results.json", *page] if self.job.out else []

    def figures(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            **self.composition.figures(),
            "library": self.job.library,
            "router": self.job.main,
            "settings": repr(self.main),
            "combination": self.job.combination,
            "against": list(self.routers)[1:],
            "sites": len(self.sites),
            "samples": len(self.asked),
            "tokens": self.asked.tokens,
            "labels": list(self.asked.labels),
            "readings": len(self.routers) if self.reads else 0,
            "max_new_tokens": self.job.max_new_tokens,
            "temperature": self.job.temperature,
            "seed": self.job.seed,
            "chat": self.job.chat,
            "calibrate": None if self.job.calibrate is None else str(self.job.calibrate),
            "files": self.files,
        }


def plan_compose(job: ComposeJob, progress: Progress = quiet) -> ComposePlan:
    """Check everything that can be checked without the base's weights.

    Raises:
        ConfigError: A prompt file, a router or a setting is wrong, or an oracle lacks labels.
        CheckpointError: No such base or library, or an adapter of another base.
        ContextLengthError: A prompt leaves no room for an answer.
    """
    prompts = read_prompts(job.prompts)
    extra = None if job.calibrate is None else read_prompts(job.calibrate)
    decoding = job.decoding
    routers = _routers(job, prompts)
    composition = look(job.base, job.library, any_base=job.any_base, progress=progress)
    _check_labels(routers, prompts, composition.shelf.names)
    _check_widths(job, len(composition.shelf))
    sites, *_ = [composition.sites(one, job.combination) for one in routers.values() if one]
    base = composition.base
    texts = encode(prompts, base.tokenizer, context=base.context, truncate=True)  # refused below
    asked = encode_chat(prompts, base.tokenizer) if job.chat else texts
    decoding.check(asked, base.context)
    calibration = extra and encode(extra, base.tokenizer, context=base.context, truncate=True)
    return ComposePlan(job, composition, sites, prompts, asked, texts, routers, calibration or None)


def _routers(job: ComposeJob, prompts: Sequence[Prompt]) -> dict[str, Router | None]:
    labels = [prompt.label for prompt in prompts]
    if job.spec.kind == BASE:
        raise ConfigError(f"--router {BASE} composes nothing; compare with it: --against {BASE}")
    found = {job.main: job.spec.make(labels)}
    if job.calibrate is not None and isinstance(found[job.main], Uniform | Fixed | Oracle):
        raise ConfigError(f"router {job.spec.kind!r} has no scores to calibrate: leave it out")
    for text in job.against:
        spec = RouterSpec.parse(text)
        if spec.name in found:
            raise ConfigError(f"router {spec.name!r} is named twice: it is compared with itself")
        found[spec.name] = spec.make(labels)
    return found


def _check_widths(job: ComposeJob, adapters: int) -> None:
    """A router's own default may be more than a small library has; a number that was asked for not.

    Modules with fewer adapters use those that they have, so nothing later would tell.
    """
    for spec in (job.spec, *map(RouterSpec.parse, job.against)):
        if spec.top_k is not None and spec.top_k > adapters:
            raise ConfigError(
                f"router {spec.name!r} is to choose {spec.top_k} of {adapters} adapters: lower "
                f"top_k, or leave it out"
            )


def _check_labels(
    routers: Mapping[str, Router | None], prompts: Sequence[Prompt], names: Sequence[str]
) -> None:
    """An oracle's labels must name adapters."""
    if not any(isinstance(router, Oracle) for router in routers.values()):
        return
    for prompt in prompts:
        if prompt.label not in names:
            raise ConfigError(
                f"{prompt.where}: the {ORACLE} needs the name of an adapter, the label is "
                f"{prompt.label!r}. The library has {', '.join(names)}."
            )
