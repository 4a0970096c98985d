from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import expertmix as em
from expertmix.errors import CheckpointError, ConfigError, OutputError, UnsupportedModelError
from expertmix.models.fitting import load_routers, random_routers, save_routers
from expertmix.models.library import Library
from expertmix.models.unmerged import routed
from expertmix.models.upcycle import upcycle

from .conftest import load, peft_adapter, peft_model, save_base, tiny_config

TEXTS = {"ada": ["aaaa aaaa"], "bob": ["bbbb bbbb"], "cyd": ["cccc cccc"]}


@pytest.fixture
def moe(base: Path, shelf: Path, tmp_path: Path) -> Path:
    return upcycle(base, Library.open(shelf), tmp_path / "moe", router="random")


@contextmanager
def forced(model: Any, expert: int) -> Iterator[None]:
    """All weight on one expert, at every layer."""

    def force(_module: Any, _inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> Any:
        logits, weights, index = output
        weights, index = torch.zeros_like(weights), torch.full_like(index, expert)
        weights[:, 0] = 1.0
        index[:, 1:] = (expert + 1) % logits.shape[1]
        return logits, weights, index

    handles = [layer.mlp.gate.register_forward_hook(force) for layer in model.model.layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", ["ada", "bob", "cyd"])
def test_one_hot_routing_is_base_plus_adapter(
    base: Path, shelf: Path, moe: Path, prompt: Tensor, name: str
) -> None:
    """With all weight on expert e, the MoE gives PEFT's own logits of base + adapter e."""
    names = json.loads((moe / "expertmix.json").read_text())["experts"]
    model = load(moe)
    with torch.no_grad(), forced(model, names.index(name)):
        ours = model(prompt).logits
    with torch.no_grad():
        theirs = peft_model(base, shelf / name)(prompt).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)


def test_one_hot_routing_to_the_base_is_the_base(base: Path, moe: Path, prompt: Tensor) -> None:
    """Expert 0 is the unchanged base."""
    model = load(moe)
    with torch.no_grad(), forced(model, 0):
        ours = model(prompt).logits
    with torch.no_grad():
        torch.testing.assert_close(ours, load(base)(prompt).logits, atol=1e-5, rtol=1e-5)


def test_recording_names_the_experts(moe: Path) -> None:
    """`em.sites` of a written MoE gives the base's and the adapters' names, from its config."""
    names = json.loads((moe / "expertmix.json").read_text())["experts"]
    model = load(moe)
    assert {info.experts for info in em.sites(model)} == {tuple(names)}


def test_copies_of_the_base_are_the_base(base: Path, tmp_path: Path, prompt: Tensor) -> None:
    """A MoE whose experts all equal the base gives the base's logits, whatever the router says."""
    for name in ("one", "two"):
        peft_adapter(base, tmp_path / "shelf" / name, 1, init_lora_weights=True)
    out = upcycle(base, Library.open(tmp_path / "shelf"), tmp_path / "moe", router="random")
    with torch.no_grad():
        torch.testing.assert_close(
            load(out)(prompt).logits, load(base)(prompt).logits, atol=1e-5, rtol=1e-5
        )


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
KINDS: dict[str, Callable[[], Any]] = {
    "mistral, sliding window": lambda: MistralForCausalLM(
        MistralConfig(**sizes(), sliding_window=4, head_dim=12)
    ),
    "llama, llama3 rope": lambda: LlamaForCausalLM(tiny_config(rope_parameters=LLAMA3)),
    "llama, gelu": lambda: LlamaForCausalLM(tiny_config(hidden_act="gelu")),
}


def sizes() -> dict[str, Any]:
    kept = ("size", "num_", "rope_parameters", "initializer_range", "pad_token_id")
    config = tiny_config().to_dict()
    return {key: value for key, value in config.items() if any(word in key for word in kept)}


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_of_base_that_is_taken_is_repeated(
    tmp_path: Path, prompt: Tensor, kind: str
) -> None:
    """Sliding windows, scaled rope and other activations come through: copies are the base."""
    torch.manual_seed(1)
    base = save_base(tmp_path / "base", KINDS[kind]())
    library = Library.open(
        peft_adapter(base, tmp_path / "shelf" / "one", 1, init_lora_weights=True)
    )
    out = upcycle(base, library, tmp_path / "moe", router="random")
    with torch.no_grad():
        torch.testing.assert_close(
            load(out)(prompt).logits, load(base)(prompt).logits, atol=1e-5, rtol=1e-5
        )


def test_unmerged_is_the_written_moe(
    base: Path, shelf: Path, tmp_path: Path, prompt: Tensor
) -> None:
    """The unmerged MoE, on which routers are fitted, computes what the written one computes."""
    library = Library.open(shelf)
    routers = random_routers(tiny_config(), 4, seed=3)
    out = upcycle(base, library, tmp_path / "moe", router=routers)
    model = load(base)
    with torch.no_grad(), routed(model, library, lambda layer, x: x @ routers[layer].T):
        ours = model(prompt).logits
    with torch.no_grad():
        torch.testing.assert_close(ours, load(out)(prompt).logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(model(prompt).logits, load(base)(prompt).logits)


def test_shards_and_one_file_hold_the_same(
    base: Path, shelf: Path, tmp_path: Path, prompt: Tensor
) -> None:
    """The size of a weights file changes nothing but the number of files."""
    library = Library.open(shelf)
    whole = upcycle(base, library, tmp_path / "whole", router="random")
    parts = upcycle(base, library, tmp_path / "parts", router="random", max_shard_bytes=50_000)
    assert len(list(parts.glob("*.safetensors"))) > 2
    with torch.no_grad():
        torch.testing.assert_close(load(parts)(prompt).logits, load(whole)(prompt).logits)


def test_upcycling_twice_gives_the_same_bytes(base: Path, shelf: Path, tmp_path: Path) -> None:
    """Fitting and writing are deterministic."""
    library = Library.open(shelf)
    files = [
        upcycle(base, library, tmp_path / name, texts=TEXTS) / "model.safetensors"
        for name in ("first", "second")
    ]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_config_and_tokenizer_are_those_of_the_base(base: Path, moe: Path) -> None:
    """Rope, tied embeddings, tokenizer and chat template come from the base; experts are named."""
    config, source = load(moe).config, load(base).config
    assert config.model_type == "mixtral"
    assert config.rope_parameters == source.rope_parameters
    assert config.tie_word_embeddings == source.tie_word_embeddings
    assert config.sliding_window is None
    tokenizer = AutoTokenizer.from_pretrained(moe)
    assert (
        tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    )
    assert json.loads((moe / "expertmix.json").read_text()) == {
        "format": 1,
        "base": "tiny-llama",
        "experts": ["base", "ada", "bob", "cyd"],
        "top_k": 2,
    }


def test_without_base_the_adapters_are_all(base: Path, shelf: Path, tmp_path: Path) -> None:
    """include_base=False leaves the adapters alone; top_k and dtype are taken as given."""
    out = upcycle(
        base, Library.open(shelf), tmp_path / "moe", router="random",
        include_base=False, top_k=3, dtype=torch.bfloat16,
    )  # fmt: skip
    config = json.loads((out / "config.json").read_text())
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (3, 3)
    assert config["dtype"] == "bfloat16"


def test_saved_routers_are_used(base: Path, shelf: Path, tmp_path: Path) -> None:
    """A router file goes into the gates as it is; one for other experts is refused."""
    library = Library.open(shelf)
    routers = random_routers(tiny_config(), 4, seed=5)
    file = tmp_path / "routers.safetensors"
    save_routers(file, routers, ("base", "ada", "bob", "cyd"))
    out = upcycle(base, library, tmp_path / "moe", router=file)
    gate = load(out).model.layers[1].mlp.gate.weight
    assert torch.equal(gate, routers[1].bfloat16().float())
    with pytest.raises(CheckpointError, match="for experts"):
        load_routers(file, ("base", "ada", "cyd", "bob"))


def refuse(error: type[Exception], words: str, out: Path, *args: Any, **settings: Any) -> None:
    """The error is raised, and nothing is left at or beside the target."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(error, match=words):
        upcycle(*args, out, **settings)
    assert sorted(out.parent.iterdir()) == before


def test_other_architectures_are_refused_with_the_reason(shelf: Path, tmp_path: Path) -> None:
    """A base that Mixtral does not repeat exactly is refused, naming what differs."""
    qwen = Qwen2ForCausalLM(Qwen2Config(**sizes()))
    library, out = Library.open(shelf), tmp_path / "moe"
    folder = save_base(tmp_path / "qwen", qwen)
    refuse(UnsupportedModelError, "biases", out, folder, library, router="random")
    biased = LlamaForCausalLM(tiny_config(attention_bias=True))
    folder = save_base(tmp_path / "biased", biased)
    refuse(UnsupportedModelError, "bias", out, folder, library, router="random")


def test_adapters_of_another_base_are_refused(shelf: Path, tmp_path: Path) -> None:
    """An adapter whose shapes or layers the base does not have is named with its module."""
    wide = save_base(tmp_path / "wide", LlamaForCausalLM(tiny_config(intermediate_size=64)))
    short = save_base(tmp_path / "short", LlamaForCausalLM(tiny_config(num_hidden_layers=1)))
    library, out = Library.open(shelf), tmp_path / "moe"
    refuse(CheckpointError, "ada.*another base", out, wide, library, router="random")
    refuse(CheckpointError, r"ada.*layers\.1", out, short, library, router="random")


def test_adapters_of_attention_are_refused(base: Path, tmp_path: Path) -> None:
    """Attention is shared by all experts, so an adapter that changes it cannot become one."""
    folder = peft_adapter(base, tmp_path / "eve", 1, target_modules=["q_proj", "up_proj"])
    library = Library.open(folder)
    refuse(CheckpointError, "eve.*q_proj", tmp_path / "moe", base, library, router="random")


def test_wrong_settings_are_refused(base: Path, shelf: Path, tmp_path: Path) -> None:
    """top_k, routers and texts that do not fit are typed errors that say what fits."""
    library, out = Library.open(shelf), tmp_path / "moe"
    refuse(ConfigError, "between 1 and 4", out, base, library, router="random", top_k=5)
    refuse(ConfigError, "layer 0", out, base, library, router={})
    refuse(ConfigError, "texts", out, base, library)
    refuse(ConfigError, "cyd", out, base, library, texts={"ada": ["a"], "bob": ["b"]})
    refuse(ConfigError, "eve", out, base, library, texts={**TEXTS, "eve": ["e"]})
    refuse(CheckpointError, "routers", out, base, library, router="absent.safetensors")


def test_a_base_without_safetensors_is_refused(shelf: Path, tmp_path: Path) -> None:
    """Pickled bases, folders that are no model, and names that nobody knows are typed errors."""
    library, out, folder = Library.open(shelf), tmp_path / "moe", tmp_path / "pickled"
    folder.mkdir()
    refuse(CheckpointError, "config.json", out, folder, library, router="random")
    tiny_config().save_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    refuse(CheckpointError, "pickled", out, folder, library, router="random")
    refuse(CheckpointError, "neither", out, "no such: model", library, router="random")


def test_a_broken_config_is_refused(base: Path, shelf: Path, tmp_path: Path) -> None:
    """A config that is not JSON, or of an unknown kind of model, is a typed error."""
    library, out, folder = Library.open(shelf), tmp_path / "moe", tmp_path / "broken"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(base / "model.safetensors")
    for text in ("{", '{"model_type": "unheard-of"}'):
        (folder / "config.json").write_text(text)
        refuse(CheckpointError, "config of broken", out, folder, library, router="random")


def test_an_occupied_target_is_left_alone(base: Path, shelf: Path, tmp_path: Path) -> None:
    """What is already at the target is never overwritten."""
    (tmp_path / "moe").mkdir()
    (tmp_path / "moe" / "mine.txt").write_text("mine")
    refuse(OutputError, "exists", tmp_path / "moe", base, Library.open(shelf), router="random")
    assert (tmp_path / "moe" / "mine.txt").read_text() == "mine"


def test_an_error_while_writing_leaves_nothing(base: Path, shelf: Path, tmp_path: Path) -> None:
    """When writing fails in the middle, neither the target nor a half-built folder remains."""

    def full_disk(stage: str, done: int, total: int) -> None:
        if done == total // 2:
            raise OSError(28, "No space left on device")

    refuse(
        OutputError, "the disk is full", tmp_path / "moe", base, Library.open(shelf),
        router="random", progress=full_disk,
    )  # fmt: skip


def test_progress_reaches_the_end(base: Path, shelf: Path, tmp_path: Path) -> None:
    """Progress counts up to its total in every stage."""
    seen: dict[str, tuple[int, int]] = {}

    def note(stage: str, done: int, total: int) -> None:
        seen[stage] = (done, total)

    upcycle(base, Library.open(shelf), tmp_path / "moe", texts=TEXTS, progress=note)
    assert set(seen) == {"fitting routers", "writing experts"}
    assert all(done == total for done, total in seen.values())
