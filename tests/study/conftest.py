"""Tiny models on disk with a tokenizer: a MoE with named experts, and the dense kind."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from expertmix.testing import tiny_moe, tiny_tokenizer

from .composing import asked, base, foreign, library, plain  # noqa: F401  fixtures

DOMAINS = (
    "maths", "backward", "python", "medicine", "shakespeare", "science", "reading", "encyclopedia",
)  # fmt: skip
EXPERTS = ("base", *DOMAINS)


def saved(folder: Path, model_type: str, *, names: tuple[str, ...] = (), **overrides) -> Path:
    model = tiny_moe(model_type, **overrides)
    if names:
        model.config.expert_names = list(names)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine experts, named after the demo's domains; two per token; context of 128."""
    folder = tmp_path_factory.mktemp("models") / "moe"
    return saved(folder, "mixtral", names=EXPERTS, num_local_experts=9, num_experts_per_tok=2)


@pytest.fixture(scope="session")
def other_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same structure with other weights."""
    folder = tmp_path_factory.mktemp("models") / "other"
    return saved(folder, "mixtral", seed=1, num_local_experts=9, num_experts_per_tok=2)


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense Llama."""
    return saved(tmp_path_factory.mktemp("models") / "dense", "llama")


@pytest.fixture(scope="session")
def pickled(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with pickled weights only."""
    folder = tmp_path_factory.mktemp("models") / "pickled"
    folder.mkdir()
    for file in dense.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    return folder


@pytest.fixture
def locked(tmp_path: Path) -> Path:
    """A folder in which nothing can be created."""
    if os.geteuid() == 0:  # root may write nearly everywhere
        return Path("/sys")
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Three prompts with two labels."""
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"text": "two and two is four", "label": "maths"}\n'
        '{"text": "def add(a, b): return a + b", "label": "python"}\n'
        "\n"
        '{"prompt": "one more sum", "label": "maths"}\n'
    )
    return path


def everything(folder: Path) -> list[str]:
    """All files and folders below, hidden ones too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture(scope="session")
def adapters(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two LoRA adapters of the dense model's MLPs, with random factors."""
    root = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("ada", "bob")):
        _adapter(root / name, dense, seed)
    return root


def _adapter(folder: Path, model: Path, seed: int, rank: int = 2) -> None:
    config = json.loads((model / "config.json").read_text())
    sizes = (config["hidden_size"], config["intermediate_size"])
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for name, (into, out) in {"up": sizes, "gate": sizes, "down": sizes[::-1]}.items():
            module = f"base_model.model.model.layers.{layer}.mlp.{name}_proj"
            tensors[f"{module}.lora_A.weight"] = torch.randn(rank, into, generator=generator)
            tensors[f"{module}.lora_B.weight"] = torch.randn(out, rank, generator=generator)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2, "target_modules": ["up_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
