"""Who runs against whom in `spectr.py`: models in SmolLM2-135M's shape, libraries, and rivals.

Knows nothing of how they are measured.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from expertmix.experts.composed import Composed
from expertmix.experts.lora import Adapter, Factors
from expertmix.experts.peft_folder import read_library
from expertmix.experts.shelf import Shelf
from expertmix.experts.stack import Projections
from expertmix.routers.router import Router
from expertmix.routers.spectr import SpectR

TOP_K = 3
ROUTER = SpectR(top_k=TOP_K)
VOCABULARY = 49152
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Block = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class Case:
    """Which modules the adapters adapt, and at which rank."""

    name: str
    targets: tuple[str, ...]
    rank: int

    def linears(self, layers: int) -> dict[str, Any]:
        """The modules of a model that they adapt."""
        return {
            path: module
            for path, module in llama(layers).named_modules()
            if path.rpartition(".")[2] in self.targets
        }


QV = Case("qv8", ("q_proj", "v_proj"), 8)
LINEAR = Case("all16", ALL, 16)


@dataclass(frozen=True)
class Contestant:
    """A model, and the block inside of which it is what it is called."""

    model: Any
    block: Block


def llama(layers: int, vocabulary: int | None = None) -> Any:
    """Random weights in the shape of SmolLM2-135M; a vocabulary in proportion to its layers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY * layers // 30 if vocabulary is None else vocabulary,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).train(False)


def adapters(case: Case, count: int, layers: int) -> list[Adapter]:
    """Random adapters, in memory."""
    linears = case.linears(layers)
    return [
        Adapter(f"a{number:04}", {path: Factors(*pair, 16 / case.rank) for path, pair in found})
        for number in range(count)
        for found in [_factors(number, linears, case)]
    ]


def _factors(
    seed: int, linears: Mapping[str, Any], case: Case
) -> list[tuple[str, tuple[Tensor, Tensor]]]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for path, linear in linears.items():
        down = torch.randn(case.rank, linear.in_features, generator=generator)
        up = torch.randn(linear.out_features, case.rank, generator=generator)
        found.append((path, (0.04 * down, 0.02 * up)))
    return found


def write_library(root: Path, case: Case, count: int, layers: int) -> list[Path]:
    """The same, as PEFT stores them."""
    from peft import LoraConfig

    config = LoraConfig(
        r=case.rank, lora_alpha=16, target_modules=list(case.targets), task_type="CAUSAL_LM"
    )
    settings = json.dumps(
        {key: sorted(v) if isinstance(v, set) else v for key, v in config.to_dict().items()},
        default=str,
    )
    linears = case.linears(layers)
    return [
        _write(root / f"a{number:04}", settings, _factors(number, linears, case))
        for number in range(count)
    ]


def _write(folder: Path, settings: str, factors: list[tuple[str, tuple[Tensor, Tensor]]]) -> Path:
    tensors = {}
    for path, (down, up) in factors:
        key = f"base_model.model.{path}.lora_"
        tensors[f"{key}A.weight"], tensors[f"{key}B.weight"] = down, up
    folder.mkdir()
    (folder / "adapter_config.json").write_text(settings)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def one_adapter(base: Any, folder: Path) -> Any:
    """PEFT with one unmerged adapter."""
    from peft import PeftModel

    return PeftModel.from_pretrained(base, str(folder)).train(False)


def peft_arrow(base: Any, library: Sequence[Path]) -> Any:
    """PEFT's own Arrow over the library."""
    from peft import ArrowConfig, create_arrow_model

    paths = [str(folder) for folder in library]
    config = ArrowConfig(top_k=TOP_K, router_temperature=1.0)
    return create_arrow_model(base, paths, config).train(False)


def ours(
    base: Any, shelf: Shelf, projections: Projections = None, router: Router = ROUTER
) -> Contestant:
    """A shelf on the base, routed; `None` is what a user gets."""
    return Contestant(base, lambda: Composed(base, shelf, router, projections=projections))


@contextmanager
def naive_loop(model: nn.Module, library: Sequence[Path]) -> Iterator[None]:
    """Projection scores, and then adapter after adapter, at every module."""
    loaded = list(read_library(library))
    with ExitStack() as stack:
        for path, module in model.named_modules():
            factors = [one.factors[path] for one in loaded if path in one.factors]
            if factors:
                pairs = [(f.down, f.scale * f.up, torch.linalg.qr(f.down.T)[0]) for f in factors]
                stack.callback(module.register_forward_hook(_looping(pairs)).remove)
        yield


def _looping(pairs: list[tuple[Tensor, Tensor, Tensor]]) -> Callable[..., Tensor]:
    def add(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        x = args[0]
        scores = torch.stack([(x @ basis).norm(dim=-1) for _, _, basis in pairs], -1)
        chosen = scores.topk(TOP_K, dim=-1).indices
        weights = torch.zeros_like(scores).scatter(-1, chosen, 1 / TOP_K)
        for number, (down, up, _) in enumerate(pairs):
            output = output + weights[..., number, None] * (x @ down.T @ up.T)
        return output

    return add
