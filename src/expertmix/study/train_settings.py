"""The settings of `expertmix train`: one YAML, as `TrainSettings`.

Says what is asked for and whether it makes sense; opens no other file. docs/train.md shows a YAML.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

from expertmix.errors import ConfigError
from expertmix.study.train_yaml import made, read_yaml

What = Literal["all", "routers", "experts", "routers_and_scales", "lora"]
Schedule = Literal["cosine", "linear", "constant"]
Parallel = Literal["ddp", "fsdp", "experts"]
Unit = Literal["paragraphs", "lines", "file"]
Tracker = Literal["none", "trackio", "tensorboard", "wandb"]

OWN = "own"
"""In the place of a tokenizer: byte-level BPE, trained on the training texts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class New:
    """A model that begins with random weights.

    Attributes:
        new: `type`, a model type of transformers such as `coe` or `olmoe`; `tokenizer`, a folder,
            a hub id, `default` or `own`; and any field of that type's config.
    """

    new: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """Texts.

    Attributes:
        train: Files: .jsonl, .csv, .parquet with a column of text, or .txt.
        validation: Files, or the share of training documents that is split off with the seed.
        column: Where the text is.
        unit: What a document is in a .txt.
    """

    train: tuple[Path, ...]
    validation: float | tuple[Path, ...] = 0.0
    column: str = "text"
    unit: Unit = "paragraphs"


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """Low-rank adapters, with `what: lora` (arXiv 2106.09685).

    Attributes:
        rank: r.
        alpha: Updates are scaled by alpha / r.
        dropout: On what goes into an adapter.
        targets: Ends of module names; `all-linear` for every linear map but the head.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("all-linear",)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """A model, texts, and how to train.

    Attributes:
        model: Folder, hub id, `default`, `default-moe`; or a section `new`.
        data: Texts.
        out: Results folder. Relative paths count from the folder of the config.
        sequence_length: Tokens of a block.
        packing: Join documents, each with an end-of-text token, and cut them into blocks;
            otherwise each document begins a block of its own, padded.
        steps, epochs, tokens: How long; one of them.
        batch_size: Blocks per optimizer step, over all processes and micro-batches.
        accumulation: Micro-batches of a step.
        learning_rate: At its peak.
        schedule: After the warm-up, down to 0 or constant.
        warmup: Steps; below 1, a share of all.
        weight_decay: Of matrices; norms and biases have none.
        betas: Of AdamW.
        clip: Largest norm of the gradient; 0 clips nothing.
        precision: Of the arithmetic; weights and optimizer are float32.
        seed: Of weights, splits and the order of the data.
        what: What is trained.
        lora: Adapters.
        bias_rate: Of the aux-free balance, where the model's routers have a bias.
        log_every, eval_every, save_every: Steps; None evaluates, or saves, at the end only.
        keep: Checkpoints to keep.
        report_to: Trackers that get the same figures.
        experts_implementation: Of transformers.
        parallel: What several processes of torchrun do: each has all weights, or a part
            (`fsdp`), and of the experts only its own (`experts`).
        device: `auto` or `cpu`.
    """

    model: str | New
    data: Data
    out: Path
    sequence_length: int = 512
    packing: bool = True
    steps: int | None = None
    epochs: float | None = None
    tokens: int | None = None
    batch_size: int = 16
    accumulation: int = 1
    learning_rate: float = 3e-4
    schedule: Schedule = "cosine"
    warmup: float = 0.1
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    precision: Literal["float32", "bf16"] = "float32"
    seed: int = 0
    what: What = "all"
    lora: Lora = field(default_factory=Lora)
    bias_rate: float = 0.001
    log_every: int = 10
    eval_every: int | None = None
    save_every: int | None = None
    keep: int = 2
    report_to: tuple[Tracker, ...] = ("none",)
    experts_implementation: str = "grouped_mm"
    parallel: Parallel = "ddp"
    device: Literal["auto", "cpu"] = "auto"

    def __post_init__(self) -> None:
        lengths = [self.steps, self.epochs, self.tokens]
        if sum(one is not None for one in lengths) != 1:
            raise ConfigError("give one of steps, epochs and tokens: how long to train")
        for name in _AT_LEAST_1:
            _at_least(self, name, 1)
        for name in ("warmup", "weight_decay", "clip", "bias_rate"):
            _at_least(self, name, 0)
        if not self.learning_rate > 0:
            raise ConfigError(f"learning_rate={self.learning_rate} must be above 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas={list(self.betas)} must be in [0, 1)")
        if self.epochs is not None and not self.epochs > 0:
            raise ConfigError(f"epochs={self.epochs} must be above 0")
        if self.batch_size % self.accumulation:
            raise ConfigError(
                f"batch_size={self.batch_size} does not split into accumulation="
                f"{self.accumulation} micro-batches of the same size"
            )
        split = self.data.validation
        if isinstance(split, float) and not 0 <= split < 1:
            raise ConfigError(f"data.validation={split} must be files, or a share in [0, 1)")
        if self.lora.rank < 1:
            raise ConfigError(f"lora.rank={self.lora.rank} must be at least 1")

    @property
    def trackers(self) -> tuple[str, ...]:
        """Those that are not `none`."""
        return tuple(one for one in self.report_to if one != "none")

    def to_dict(self) -> dict[str, Any]:
        """As YAML and JSON have it."""
        found: dict[str, Any] = _plain(self)
        return found


_AT_LEAST_1 = (
    "sequence_length", "steps", "tokens", "batch_size", "accumulation", "log_every", "eval_every",
    "save_every", "keep",
)  # fmt: skip


def load_settings(path: Path) -> TrainSettings:
    """Read a config and check every key.

    Raises:
        ConfigError: An unknown key (the nearest known one is named), a wrong type or value.
    """
    settings = made(TrainSettings, read_yaml(path))
    return _anchored(settings, path.absolute().parent)


def _anchored(settings: TrainSettings, folder: Path) -> TrainSettings:
    """Paths count from the folder of the config, wherever the command is called."""
    data, split = settings.data, settings.data.validation
    files = split if isinstance(split, float) else tuple(folder / one for one in split)
    placed = replace(data, train=tuple(folder / one for one in data.train), validation=files)
    model = settings.model
    if isinstance(model, str) and (folder / model).is_dir():
        model = str(folder / model)
    if isinstance(model, New):
        model = New(new=_anchored_tokenizer(model.new, folder))
    return replace(settings, data=placed, out=folder / settings.out, model=model)


def _anchored_tokenizer(new: dict[str, Any], folder: Path) -> dict[str, Any]:
    tokenizer = new.get("tokenizer")
    if isinstance(tokenizer, str) and (folder / tokenizer).is_dir():
        return {**new, "tokenizer": str(folder / tokenizer)}
    return new


def _at_least(settings: TrainSettings, name: str, least: int) -> None:
    value = getattr(settings, name)
    if value is not None and not value >= least:
        raise ConfigError(f"{name}={value} must be at least {least}")


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {one.name: _plain(getattr(value, one.name)) for one in fields(value)}
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value
