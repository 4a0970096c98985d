"""A tiny random Llama, adapters made by PEFT, and a reference that does everything naively."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from expertmix.experts.lora import Adapter, Factors

VOCAB = 32
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
IDS = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(3))


def tiny_llama(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.2,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).to(dtype).train(False)


@contextmanager
def calm() -> Iterator[None]:
    """PEFT warns of much; these tests are not about that."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def peft_adapter(folder: Path, seed: int, **config: Any) -> Path:
    """A LoRA with random factors, trained by nobody, saved by PEFT."""
    from peft import LoraConfig, get_peft_model

    settings: dict[str, Any] = {
        "r": 4, "lora_alpha": 8, "target_modules": list(ALL), "init_lora_weights": False,
    }  # fmt: skip
    with calm():
        base = tiny_llama()
        torch.manual_seed(seed)
        get_peft_model(base, LoraConfig(**{**settings, **config})).save_pretrained(folder)
    return folder


def peft_model(*folders: Path) -> Any:
    """A PeftModel on the tiny Llama with these adapters loaded; the first is active."""
    from peft import PeftModel

    with calm():
        model = PeftModel.from_pretrained(
            tiny_llama(), str(folders[0]), adapter_name=folders[0].name
        )
        for folder in folders[1:]:
            model.load_adapter(str(folder), adapter_name=folder.name)
    return model.train(False)


def random_adapter(
    name: str,
    seed: int,
    modules: Iterable[str] = ("mlp.up_proj",),
    *,
    rank: int = 4,
    shape: tuple[int, int] = (48, 32),
    scale: float = 2.0,
    dtype: torch.dtype = torch.float64,
) -> Adapter:
    """Normal factors for modules of one shape."""
    generator = torch.Generator().manual_seed(seed)
    out, width = shape

    def factors() -> Factors:
        down = torch.randn(rank, width, generator=generator, dtype=torch.float64)
        up = torch.randn(out, rank, generator=generator, dtype=torch.float64)
        return Factors(down.to(dtype), up.to(dtype), scale)

    return Adapter(name, {module: factors() for module in modules})


def zero(adapter: Adapter) -> Adapter:
    """The same with B = 0."""
    return Adapter(
        adapter.name,
        {m: Factors(f.down, torch.zeros_like(f.up), f.scale) for m, f in adapter.factors.items()},
    )


Choose = Callable[[Tensor, Sequence[Tensor]], Tensor]
"""From (D,) x and the (m, D) updates of all adapters to E weights."""


def deltas(adapters: Sequence[Adapter], module: str) -> list[Tensor]:
    """scale * B @ A of every adapter in float64; zeros where it does not adapt the module."""
    known = [adapter.factors[module] for adapter in adapters if module in adapter.factors]
    zeros = torch.zeros(known[0].shape, dtype=torch.float64)
    return [
        factors.scale * factors.up.double() @ factors.down.double()
        if (factors := adapter.factors.get(module)) is not None
        else zeros
        for adapter in adapters
    ]


def projection_score(x_D: Tensor, delta_mD: Tensor) -> float:
    """‖Vᵀ x‖ by a full SVD of the update itself; minus infinity for a zero update."""
    _, singular, right = torch.linalg.svd(delta_mD, full_matrices=False)
    keep = singular > 1e-9 * max(float(singular[0]), 1e-30)
    if float(singular[0]) == 0:
        return float("-inf")
    return float((right[keep] @ x_D).norm())


def energy_score(x_D: Tensor, delta_mD: Tensor) -> float:
    """‖scale B A x‖, taken literally."""
    return float((delta_mD @ x_D).norm()) if bool(delta_mD.any()) else float("-inf")


def arrow_score(x_D: Tensor, delta_mD: Tensor) -> float:
    """|v1ᵀ x| by a full SVD of the update itself."""
    _, singular, right = torch.linalg.svd(delta_mD, full_matrices=False)
    return float((right[0] @ x_D).abs()) if float(singular[0]) else float("-inf")


def top_weights(
    scores: Sequence[float], top_k: int, weights: str, temperature: float = 1.0
) -> Tensor:
    """E weights by a sort in plain Python."""
    order = sorted(range(len(scores)), key=lambda expert: -scores[expert])
    chosen = [expert for expert in order if scores[expert] > float("-inf")][:top_k]
    values = torch.tensor([scores[expert] for expert in chosen], dtype=torch.float64)
    shares = torch.softmax(values / temperature, 0)
    if weights == "uniform":
        shares = torch.full_like(shares, 1 / len(chosen))
    result = torch.zeros(len(scores), dtype=torch.float64)
    result[chosen] = shares
    return result


def naive_outputs(x_TD: Tensor, updates: Sequence[Tensor], weights_TE: Tensor) -> Tensor:
    """Σ w_i (scale B A)_i x, token by token and adapter by adapter, in float64."""
    rows = [
        sum(
            (weight * (update @ x) for weight, update in zip(weights, updates, strict=True)),
            torch.zeros(updates[0].shape[0], dtype=torch.float64),
        )
        for x, weights in zip(x_TD.double(), weights_TE.double(), strict=True)
    ]
    return torch.stack(rows)


@contextmanager
def naive(
    model: Any, adapters: Sequence[Adapter], weigh: Callable[[str, Tensor], Tensor]
) -> Iterator[Mapping[str, Tensor]]:
    """The tiny model in float64 with a loop over tokens and adapters at every module.

    Args:
        model: A float64 model.
        adapters: All adapters.
        weigh: From a module's name and (T, D) input to (T, E) weights.
    """
    handles, seen = [], {}
    modules = {module for adapter in adapters for module in adapter.factors}
    for name, module in model.named_modules():
        if name not in modules:
            continue

        def add(_: Any, args: Any, output: Tensor, name: str = name) -> Tensor:
            flat = args[0].reshape(-1, args[0].shape[-1])
            seen[name] = weigh(name, flat)
            return output + naive_outputs(flat, deltas(adapters, name), seen[name]).view_as(output)

        handles.append(module.register_forward_hook(add))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def logits_of(model: Any, ids: Tensor = IDS, **inputs: Any) -> Tensor:
    logits: Tensor = model(ids, **inputs).logits
    return logits


def close(left: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


def state(model: Any) -> Any:
    """Everything that installing might change."""
    hooks = [
        (len(m._forward_hooks), len(m._forward_pre_hooks), list(vars(m))) for m in model.modules()
    ]
    trained = [parameter.requires_grad for parameter in model.parameters()]
    return [type(m) for m in model.modules()], hooks, trained, model.training


def double(adapters: list[Adapter]) -> list[Adapter]:
    """The same in float64."""
    return [
        Adapter(
            one.name,
            {m: Factors(f.down.double(), f.up.double(), f.scale) for m, f in one.factors.items()},
        )
        for one in adapters
    ]


def more(count: int) -> list[Adapter]:
    """Random adapters for one kind of module of the tiny Llama."""
    modules = [f"model.layers.{layer}.mlp.up_proj" for layer in (0, 1)]
    return [random_adapter(f"more{seed}", seed, modules, rank=2) for seed in range(count)]
