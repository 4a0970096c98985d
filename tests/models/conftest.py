"""A tiny random Llama on disk, and tiny LoRA adapters made by PEFT itself."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ALPHABET = "abcdefghijklmnopqrstuvwxyz ."
TARGETS = ("gate_proj", "up_proj", "down_proj")


def tiny_config(**changes: Any) -> LlamaConfig:
    settings: dict[str, Any] = {
        "vocab_size": 32,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "initializer_range": 0.2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1234.0},
        "tie_word_embeddings": True,
    }
    return LlamaConfig(**{**settings, **changes})


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {sign: i for i, sign in enumerate(["<pad>", "<s>", "</s>", "<unk>", *ALPHABET])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split("", "isolated")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="</s>"
    )
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return fast


def save_base(folder: Path, model: Any) -> Path:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", params=[True, False], ids=["tied", "untied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(tie_word_embeddings=request.param))
    return save_base(tmp_path_factory.mktemp("base") / "tiny-llama", model)


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train(False)


def peft_adapter(base: Path, folder: Path, seed: int, **config: Any) -> Path:
    """A LoRA with random factors, trained by nobody, saved by PEFT."""
    from peft import LoraConfig, get_peft_model

    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": list(TARGETS)}
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(
            load(base), LoraConfig(**{**settings, "init_lora_weights": False, **config})
        )
        model.save_pretrained(folder)
    return folder


def peft_model(base: Path, folder: Path) -> Any:
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(load(base), str(folder)).train(False)


@pytest.fixture(scope="session")
def shelf(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three adapters: a plain one, an rsLoRA, and one with rank and alpha patterns."""
    root = tmp_path_factory.mktemp("shelf")
    peft_adapter(base, root / "ada", 1)
    peft_adapter(base, root / "bob", 2, use_rslora=True, r=3)
    peft_adapter(
        base, root / "cyd", 3,
        rank_pattern={"up_proj": 2}, alpha_pattern={r"layers\.1\.mlp\.down_proj": 5},
    )  # fmt: skip
    return root


@pytest.fixture
def edited(shelf: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of adapter "ada" whose config has some keys changed."""

    def make(**changes: Any) -> Path:
        folder = tmp_path / "ada"
        folder.mkdir()
        for file in (shelf / "ada").iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        return folder

    return make


@pytest.fixture
def prompt() -> torch.Tensor:
    return torch.randint(4, 32, (2, 11), generator=torch.Generator().manual_seed(7))
