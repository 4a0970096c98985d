"""A tiny random Llama with a tokenizer on disk, and a library of adapters made by plain PEFT."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from experts.world import ALL, calm, tiny_llama

from expertmix.testing import VOCAB, tiny_tokenizer

ADAPTERS = ("ada", "bob", "cyd")
LIMIT = 128
MODULES = 14  # seven kinds in two layers


def llama(**changes: Any) -> Any:
    """With a vocabulary that fits the tokenizer."""
    return tiny_llama(vocab_size=VOCAB, max_position_embeddings=LIMIT, **changes)


def peft_adapter(folder: Path, seed: int, **config: Any) -> Path:
    """A LoRA with random factors, saved by PEFT."""
    import torch
    from peft import LoraConfig, get_peft_model

    settings = {"r": 4, "lora_alpha": 8, "target_modules": list(ALL), "init_lora_weights": False}
    with calm():
        base = llama()
        torch.manual_seed(seed)
        get_peft_model(base, LoraConfig(**{**settings, **config})).save_pretrained(folder)
    return folder


def save_base(folder: Path, *, template: str | None = None, **changes: Any) -> Path:
    """Model and tokenizer."""
    llama(**changes).save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    if template is not None:
        tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


TEMPLATE = (
    "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
    "{% if add_generation_prompt %}:{% endif %}"
)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers; context of 128; a chat template."""
    return save_base(tmp_path_factory.mktemp("compose") / "base", template=TEMPLATE)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three adapters: everywhere, at q and v, and at one MLP only."""
    root = tmp_path_factory.mktemp("compose") / "library"
    peft_adapter(root / "ada", 1)
    peft_adapter(root / "bob", 2, r=2, target_modules=["q_proj", "v_proj"])
    peft_adapter(root / "cyd", 3, r=8, target_modules=["up_proj"], layers_to_transform=[1])
    return root


@pytest.fixture(scope="session")
def foreign(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library, one adapter of which was trained on a base of another width."""
    import torch
    from peft import LoraConfig, get_peft_model

    root = tmp_path_factory.mktemp("compose") / "foreign"
    shutil.copytree(library, root)
    with calm():
        torch.manual_seed(0)
        other = get_peft_model(llama(hidden_size=48), LoraConfig(target_modules=["q_proj"]))
        other.save_pretrained(root / "eve")
    return root


def write(path: Path, rows: Sequence[tuple[str, str | None]]) -> Path:
    """A prompt file of texts and labels."""
    lines = [
        json.dumps({"text": text} if label is None else {"text": text, "label": label})
        for text, label in rows
    ]
    path.write_text("\n".join(lines))
    return path


TEXTS: tuple[tuple[str, str | None], ...] = (
    ("one and two make three", "ada"),
    ("to be or not", "bob"),
    ("def f(x): return x", "cyd"),
    ("a much longer line about nothing at all", "ada"),
    ("the end", "bob"),
)


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    """Five prompts whose labels name adapters."""
    return write(tmp_path / "asked.jsonl", TEXTS)


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """Three prompts without labels."""
    path = tmp_path / "plain.txt"
    path.write_text("first prompt\nthe second one\nthird")
    return path
