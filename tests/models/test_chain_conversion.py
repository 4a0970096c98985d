from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import expertmix as em
from expertmix.errors import CheckpointError, OutputError, UnsupportedModelError
from expertmix.models.chain_conversion import to_chain, to_moe

from .moe_families import LAYOUTS, MODELS, edit_config, make_moe, tensors


def load(folder: Path, implementation: str = "grouped_mm", dtype: Any = "auto") -> Any:
    model, found = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, experts_implementation=implementation, output_loading_info=True
    )
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    return model.train(False)


def logits(folder: Path, prompt: Tensor, implementation: str = "grouped_mm") -> Tensor:
    with torch.no_grad():
        found: Tensor = load(folder, implementation)(prompt).logits
    return found


@pytest.fixture
def moe(tmp_path: Path) -> Path:
    return make_moe(tmp_path / "moe", "mixtral")


@pytest.fixture
def chain(moe: Path, tmp_path: Path) -> Path:
    return to_chain(moe).write(tmp_path / "coe")


def set_scales(chain: Path, value: float) -> None:
    """As if added iterations had been trained."""
    changed = {
        name: torch.full_like(tensor, value) if name.endswith(".scale") else tensor
        for name, tensor in tensors(chain).items()
    }
    save_file(changed, chain / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("kind", sorted(MODELS))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_chain_computes_what_its_moe_computes(
    tmp_path: Path, prompt: Tensor, kind: str, layout: str
) -> None:
    """The logits are the MoE's, bit for bit in float32, from either layout of the experts."""
    moe = make_moe(tmp_path / "moe", kind, layout=layout)
    chain = to_chain(moe).write(tmp_path / "coe")
    for implementation in ("eager", "grouped_mm"):
        theirs, ours = (logits(f, prompt, implementation) for f in (moe, chain))
        assert theirs.abs().max() > 0.1
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(logits(chain, prompt, "expertmix"), theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_so_it_does_in_bfloat16(tmp_path: Path, prompt: Tensor, kind: str) -> None:
    """Bit for bit, too: what a family keeps in float32, a chain keeps in float32."""
    moe = make_moe(tmp_path / "moe", kind, dtype=torch.bfloat16)
    chain = to_chain(moe).write(tmp_path / "coe")
    assert {t.dtype for t in tensors(chain).values()} == {t.dtype for t in tensors(moe).values()}
    theirs, ours = (logits(folder, prompt) for folder in (moe, chain))
    torch.testing.assert_close(ours, theirs, atol=0.0, rtol=0.0)


@pytest.mark.parametrize("kind", sorted(MODELS))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_there_and_back_is_the_same_checkpoint(tmp_path: Path, kind: str, layout: str) -> None:
    """Same names, types and bits, same config.json; transformers loads it."""
    moe = make_moe(tmp_path / "moe", kind, layout=layout)
    chain = to_chain(moe, iterations=3).write(tmp_path / "coe")
    back = to_moe(chain).write(tmp_path / "back")
    check_same(moe, back)
    load(back)


def check_same(moe: Path, back: Path) -> None:
    before, after = tensors(moe), tensors(back)
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor), name
    read = [json.loads((folder / "config.json").read_text()) for folder in (moe, back)]
    assert read[0] == read[1]


@pytest.mark.parametrize("iterations", [1, 2, 4])
def test_any_number_of_iterations_computes_the_same(
    moe: Path, tmp_path: Path, prompt: Tensor, iterations: int
) -> None:
    """One is the plain MoE and has no scale; each of the others has one, at zero."""
    chain = to_chain(moe, iterations).write(tmp_path / "coe")
    assert torch.equal(logits(chain, prompt), logits(moe, prompt))
    scales = [tensor for name, tensor in tensors(chain).items() if name.endswith(".scale")]
    assert [float(scale) for scale in scales] == [0.0] * 2 * (iterations - 1)


def test_added_iterations_start_as_the_first(chain: Path) -> None:
    """Norm and router are copies."""
    found = tensors(chain)
    for layer in range(2):
        at = f"model.layers.{layer}.mlp.iterations"
        for kind in ("norm", "gate"):
            assert torch.equal(found[f"{at}.0.{kind}.weight"], found[f"{at}.1.{kind}.weight"])


def test_the_start_is_not_dead(chain: Path, prompt: Tensor) -> None:
    """Scales get a gradient at once; norms and routers of added iterations with the next step."""
    model = load(chain).train()
    added = [
        (name, weight)
        for name, weight in model.named_parameters()
        if ".iterations.1." in name and not name.endswith(".scale")
    ]
    scales = [weight for name, weight in model.named_parameters() if name.endswith(".scale")]
    model(prompt, labels=prompt).loss.backward()
    assert all(scale.grad.abs() > 1e-6 for scale in scales)
    torch.optim.SGD(scales, lr=0.1).step()
    model.zero_grad()
    model(prompt, labels=prompt).loss.backward()
    assert all(weight.grad.abs().max() > 0 for _, weight in added)


def test_what_belongs_to_the_model_comes_along(moe: Path, chain: Path, tmp_path: Path) -> None:
    """Tokenizer, generation settings, and a description by `upcycle`; there and back."""
    (moe / "expertmix.json").write_text("{}")
    chain = to_chain(moe).write(tmp_path / "coe2")
    back = to_moe(chain).write(tmp_path / "back")
    names = {file.name for file in moe.iterdir()} - {"model.safetensors", "config.json"}
    assert {"tokenizer.json", "generation_config.json", "expertmix.json"} <= names
    for folder in (chain, back):
        for name in names:
            assert (folder / name).read_bytes() == (moe / name).read_bytes()


def test_experts_keep_their_names(tmp_path: Path) -> None:
    """Those that `upcycle` gave are those of the chain's sites."""
    moe = make_moe(tmp_path / "moe", "mixtral", expert_names=list("abcde"))
    chain = to_chain(moe).write(tmp_path / "coe")
    assert {site.experts for site in em.sites(load(chain))} == {tuple("abcde")}


def test_shards_go_in_and_out(tmp_path: Path, prompt: Tensor) -> None:
    """A checkpoint of several files becomes one of several files, with an index."""
    moe = make_moe(tmp_path / "moe", "deepseek, no q_lora", max_shard_size="20KB")
    assert len(list(moe.glob("*.safetensors"))) > 2
    chain = to_chain(moe).write(tmp_path / "coe", max_shard_bytes=20_000)
    files = {file.name for file in chain.glob("*.safetensors")}
    index = json.loads((chain / "model.safetensors.index.json").read_text())
    assert len(files) > 2
    assert set(index["weight_map"].values()) == files
    assert torch.equal(logits(chain, prompt), logits(moe, prompt))
    check_same(moe, to_moe(chain).write(tmp_path / "back"))


def test_a_stored_copy_of_tied_embeddings_comes_along(tmp_path: Path) -> None:
    """Old checkpoints have one; transformers reads both names, so both are kept."""
    moe = make_moe(tmp_path / "moe", "olmoe, clipped, biased, renormalized, tied")
    stored = tensors(moe)
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    save_file(stored, moe / "model.safetensors", metadata={"format": "pt"})
    check_same(moe, to_moe(to_chain(moe).write(tmp_path / "coe")).write(tmp_path / "back"))


def test_a_chain_saved_by_transformers_goes_back(moe: Path, chain: Path, tmp_path: Path) -> None:
    """Its config remembers the MoE; tensors are the same, in another type too."""
    load(chain).save_pretrained(tmp_path / "again")
    check_same(moe, to_moe(tmp_path / "again").write(tmp_path / "back"))
    load(chain, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    half = to_moe(tmp_path / "half").write(tmp_path / "back2")
    assert {tensor.dtype for tensor in tensors(half).values()} == {torch.bfloat16}
    assert load(half).dtype == torch.bfloat16


@pytest.mark.parametrize("value", [0.5, -1e-6, float("nan")])
def test_what_was_learned_is_not_dropped_silently(
    chain: Path, tmp_path: Path, value: float
) -> None:
    """Scales that are not zero are told, with the way out."""
    set_scales(chain, value)
    with pytest.raises(UnsupportedModelError, match="--first-iteration-only leaves out"):
        to_moe(chain)


def test_the_first_iteration_alone_is_the_moe(
    moe: Path, chain: Path, tmp_path: Path, prompt: Tensor
) -> None:
    """Asked for, it is what the chain computes with one active iteration."""
    set_scales(chain, 0.5)
    assert not torch.allclose(logits(chain, prompt), logits(moe, prompt), atol=1e-3)
    back = to_moe(chain, first_iteration_only=True).write(tmp_path / "back")
    check_same(moe, back)
    short = load(chain)
    short.config.active_iterations = 1
    with torch.no_grad():
        assert torch.equal(short(prompt).logits, logits(back, prompt))


def test_only_what_was_a_moe_goes_back(moe: Path, chain: Path) -> None:
    """Not a MoE, not a chain from scratch, not one that became another model since."""
    with pytest.raises(UnsupportedModelError, match="is a mixtral, not a CoE"):
        to_moe(moe)
    edit_config(chain, num_experts_per_tok=1)
    with pytest.raises(UnsupportedModelError, match="num_experts_per_tok is 1, and was 2"):
        to_moe(chain)
    edit_config(chain, num_experts_per_tok=2, converted_from={"config": 1})
    with pytest.raises(CheckpointError, match=r"converted_from in its config\.json is broken"):
        to_moe(chain)
    edit_config(chain, converted_from=None)
    with pytest.raises(UnsupportedModelError, match="was not made of a MoE"):
        to_moe(chain)


def test_tensors_that_do_not_fit_are_told(moe: Path, chain: Path) -> None:
    """Missing, of another shape or type, or without a place: by name."""
    gate = "model.layers.1.block_sparse_moe.gate.weight"
    stored = tensors(moe)
    for change, says in (
        ({gate: None}, f"lacks 1 tensors .* {gate}"),
        ({gate: torch.zeros(4, 32)}, rf"{gate} is \(4, 32\), but its config.json asks for \(5"),
        ({"score.weight": torch.zeros(2, 2)}, "no place for its tensor 'score.weight'"),
        ({gate: torch.zeros(5, 32, dtype=torch.int8)}, f"{gate} is stored as I8"),
        (
            {gate.replace("gate", "experts.3.w1"): torch.zeros(24, 32, dtype=torch.float16)},
            "are of several types",
        ),
    ):
        kept = {name: tensor for name, tensor in (stored | change).items() if tensor is not None}
        save_file(kept, moe / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises((CheckpointError, UnsupportedModelError), match=says):
            to_chain(moe)
    save_file({"other": torch.zeros(1)}, moe / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="no tensors of experts"):
        to_chain(moe)


def test_a_conversion_that_fails_leaves_nothing(moe: Path, tmp_path: Path) -> None:
    """Neither the folder nor a part of it; what is there is not overwritten."""
    conversion = to_chain(moe)
    (moe / "model.safetensors").unlink()
    out = tmp_path / "out" / "coe"
    with pytest.raises(OutputError):
        conversion.write(out)
    assert list(out.parent.iterdir()) == []
    out.mkdir()
    (out / "mine").write_text("")
    with pytest.raises(OutputError, match="exists already"):
        conversion.write(out)
