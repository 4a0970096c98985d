"""A training run whose inputs have all been checked: `TrainPlan`. No weights were loaded."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from expertmix.core.progress import Progress, quiet
from expertmix.errors import ConfigError, MissingDependencyError
from expertmix.study import figures
from expertmix.study.loading import skeleton
from expertmix.study.train_blocks import pack
from expertmix.study.train_model import check_context, new_config, open_tokenizer
from expertmix.study.train_parts import select
from expertmix.study.train_processes import world_size
from expertmix.study.train_rhythm import Rhythm
from expertmix.study.train_settings import New, TrainSettings
from expertmix.study.train_texts import Document, file_hash, read_documents, repeated, split

_FREE = ("out", "keep", "save_every", "report_to")
"""Keys that change nothing of what comes out."""

_AUTO: Any = AutoModelForCausalLM


@dataclass(frozen=True, eq=False, slots=True)
class TrainPlan:
    """What is to be done.

    Attributes:
        settings: What was asked for.
        tokenizer: Of the model.
        config: Of a new model, or None.
        training, validation: (N, S) blocks; see `train_blocks.pack`.
        documents: How many there are to train on, and to validate.
        architecture: Class of the model.
        parameters, trainable: How many.
        hashes: SHA-256 of each file of texts, by its name.
        notices: What the user should know, in words.
    """

    settings: TrainSettings
    tokenizer: Any
    config: Any | None
    training: Tensor
    validation: Tensor
    documents: tuple[int, int]
    architecture: str
    parameters: int
    trainable: int
    hashes: dict[str, str]
    notices: tuple[str, ...]

    @property
    def rhythm(self) -> Rhythm:
        """When what happens."""
        settings = self.settings
        tokens = settings.batch_size * settings.sequence_length
        return Rhythm(
            self.steps, settings.log_every, settings.eval_every, settings.save_every,
            settings.keep, tokens, self.training.numel(),
        )  # fmt: skip

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        settings = self.settings
        if settings.steps is not None:
            return settings.steps
        if settings.epochs is not None:
            blocks = settings.epochs * len(self.training)
        else:
            assert settings.tokens is not None
            blocks = settings.tokens / settings.sequence_length
        return max(1, int(blocks // settings.batch_size))

    @property
    def pad(self) -> int:
        """Id that stands where a block is padded."""
        known = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if known is None else known)

    def identity(self) -> dict[str, Any]:
        """What decides what comes out, JSON-ready: a run goes on only where this is the same."""
        given = self.settings.to_dict()
        kept = {key: value for key, value in given.items() if key not in _FREE}
        kept["data"] = {**kept["data"], "train": [], "validation": []}
        return {**kept, "files": self.hashes, "blocks": _digest(self.training, self.validation)}

    def figures(self) -> dict[str, Any]:
        """JSON-ready."""
        rhythm = self.rhythm
        return {
            "command": "train",
            "architecture": self.architecture,
            "parameters": self.parameters,
            "trainable": self.trainable,
            "what": self.settings.what,
            "steps": rhythm.steps,
            "tokens": rhythm.steps * rhythm.tokens,
            "epochs": round(rhythm.steps * rhythm.tokens / rhythm.epoch, 4),
            "train": {"documents": self.documents[0], "blocks": len(self.training)},
            "validation": {"documents": self.documents[1], "blocks": len(self.validation)},
            "seed": self.settings.seed,
            "notices": list(self.notices),
        }

    def lock(self) -> dict[str, Any]:
        """The content of train.lock.yaml."""
        return {
            "settings": self.settings.to_dict(),
            "identity": self.identity(),
            "versions": figures.versions(),
        }


def plan_train(settings: TrainSettings, progress: Progress = quiet) -> TrainPlan:
    """Check everything before any work.

    Raises:
        ConfigError: A file, a text or a setting is wrong.
        ModelError: No such model, or it does not fit.
        MissingDependencyError: A tracker is not installed.
    """
    for tracker in settings.trackers:
        _check_tracker(tracker)
    _check_processes(settings)
    progress("reading texts", 0, 0)
    training, validation = _documents(settings)
    tokenizer = open_tokenizer(settings, [one.text for one in training])
    if isinstance(settings.model, New):
        config = new_config(settings, tokenizer)
        with torch.device("meta"):
            model = _AUTO.from_config(config, trust_remote_code=False)
    else:
        config, model = None, skeleton(settings.model, progress).model
    check_context(settings, model.config, tokenizer)
    progress("tokenizing", 0, 0)
    blocks = [
        pack(
            [one.text for one in texts], tokenizer, settings.sequence_length,
            joined=settings.packing,
        )
        for texts in (_shuffled(training, settings.seed), validation)
    ]  # fmt: skip
    files, architecture = _files(settings), type(model).__name__
    parameters = sum(one.numel() for one in model.parameters())
    model = select(model, settings.what, settings.lora)
    trainable = sum(one.numel() for one in model.parameters() if one.requires_grad)
    return TrainPlan(
        settings, tokenizer, config, blocks[0], blocks[1], (len(training), len(validation)),
        architecture, parameters, trainable, _hashes(files),
        tuple(_notices(settings, training, validation, blocks[0])),
    )  # fmt: skip


def _check_tracker(tracker: str) -> None:
    names = ("tensorboard", "tensorboardX") if tracker == "tensorboard" else (tracker,)
    if not any(importlib.util.find_spec(name) for name in names):
        raise MissingDependencyError(
            f"report_to={tracker}: the package is not installed; pip install {tracker}, or leave "
            f"it out: metrics.jsonl is written in any case"
        )


def _check_processes(settings: TrainSettings) -> None:
    world, parts = world_size(), settings.accumulation
    if settings.batch_size % (parts * world):
        raise ConfigError(
            f"batch_size={settings.batch_size} does not split into {world} processes times "
            f"accumulation={parts}"
        )
    if settings.parallel == "ddp":
        return
    if world == 1:
        raise ConfigError(
            f"parallel={settings.parallel} is for several processes: start them with torchrun "
            f"--nproc-per-node N --no-python expertmix train CONFIG, or leave it out"
        )
    if settings.save_every is not None:
        raise ConfigError(
            f"parallel={settings.parallel} shares the weights out, and transformers cannot go on "
            f"with such a run: leave out save_every, or use parallel: ddp"
        )
    if settings.what == "lora":
        raise ConfigError(f"parallel={settings.parallel} trains no adapters: use parallel: ddp")


def _documents(settings: TrainSettings) -> tuple[list[Document], list[Document]]:
    data = settings.data
    training = read_documents(data.train, data.column, data.unit)
    if isinstance(data.validation, float):
        if not data.validation:
            return training, []
        return split(training, data.validation, settings.seed)
    return training, read_documents(data.validation, data.column, data.unit)


def _shuffled(documents: Sequence[Document], seed: int) -> list[Document]:
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(documents), generator=generator).tolist()
    return [documents[number] for number in order]


def _files(settings: TrainSettings) -> list[Path]:
    split_off = settings.data.validation
    return [*settings.data.train, *(() if isinstance(split_off, float) else split_off)]


def _hashes(files: Sequence[Path]) -> dict[str, str]:
    """By name; by path where two files have one name."""
    names = [path.name for path in files]
    return {
        str(path) if names.count(path.name) > 1 else path.name: file_hash(path) for path in files
    }


def _notices(
    settings: TrainSettings,
    training: Sequence[Document],
    validation: Sequence[Document],
    blocks: Tensor,
) -> list[str]:
    found = []
    seen = repeated(training, validation)
    if seen:
        found.append(
            f"{len(seen)} of {len(validation)} validation texts are in the training texts, too, "
            f"such as {seen[0].where}: their loss says nothing about new text"
        )
    if len(blocks) < settings.batch_size:
        found.append(
            f"one step reads {settings.batch_size} blocks, and there are only {len(blocks)}: "
            f"a step sees some of them more than once"
        )
    return found


def _digest(*blocks: Tensor) -> str:
    found = hashlib.sha256()
    for one in blocks:
        found.update(str(tuple(one.shape)).encode())
        found.update(one.contiguous().numpy().tobytes())
    return found.hexdigest()
