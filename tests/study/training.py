"""Tiny training runs: a text of few words, a chain of experts, a config."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import yaml

from expertmix.study.train_job import TrainResult, run_train
from expertmix.study.train_settings import TrainSettings, load_settings

WORDS = ("the", "river", "runs", "under", "stone", "and", "light", "falls", "on", "grass", "while")

COE: dict[str, Any] = {
    "type": "coe", "tokenizer": "own", "vocab_size": 260, "hidden_size": 16,
    "moe_intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_experts": 4, "num_experts_per_tok": 2, "num_iterations": 2,
    "max_position_embeddings": 64,
}  # fmt: skip
OLMOE: dict[str, Any] = {
    "type": "olmoe", "tokenizer": "own", "vocab_size": 260, "hidden_size": 16,
    "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "num_experts": 4,
    "num_experts_per_tok": 2, "max_position_embeddings": 64,
}  # fmt: skip


def write_texts(folder: Path, count: int = 60, seed: int = 0) -> Path:
    """Paragraphs of random words."""
    chance = random.Random(seed)
    paragraphs = [" ".join(chance.choices(WORDS, k=12)) for _ in range(count)]
    path = folder / "texts.txt"
    path.write_text("\n\n".join(paragraphs))
    return path


def config(folder: Path, name: str = "run", **changes: Any) -> Path:
    """A config file in a folder; `name` is its results folder, None removes a key."""
    if not (folder / "texts.txt").exists():
        write_texts(folder)
    keys: dict[str, Any] = {
        "model": {"new": COE},
        "data": {"train": "texts.txt", "validation": 0.1},
        "sequence_length": 16,
        "steps": 6,
        "batch_size": 4,
        "learning_rate": 0.01,
        "log_every": 1,
        "device": "cpu",
        "out": name,
    } | changes
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in keys.items() if v is not None}))
    return path


def settings(folder: Path, name: str = "run", **changes: Any) -> TrainSettings:
    """The same, read."""
    return load_settings(config(folder, name, **changes))


def trained(folder: Path, name: str = "run", **changes: Any) -> TrainResult:
    """The same, done."""
    return run_train(settings(folder, name, **changes))
