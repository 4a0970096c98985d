"""What a shelf is compared with: PEFT's Arrow, PEFT's merges; and what may be put on it besides.

PEFT needs one rank for all of that, so the library is first padded with zeros to its highest rank,
which changes no update.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from expertmix.experts.lora import Adapter, Factors

MERGES: dict[str, dict[str, Any]] = {
    "merge_linear": {"combination_type": "linear"},
    "merge_ties": {"combination_type": "ties", "density": 0.5},
    "merge_dare": {"combination_type": "dare_linear", "density": 0.5},
}
"""PEFT's own ways, with equal weights that add up to one (ties: one each, it averages itself)."""


def padded_library(root: Path, adapters: Sequence[Adapter], targets: Sequence[str]) -> list[Path]:
    """Write adapters for PEFT, all with the highest rank among them and alpha = rank."""
    rank = max(factors.down.shape[0] for one in adapters for factors in one.factors.values())
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank,
        "target_modules": list(targets), "base_model_name_or_path": "base", "inference_mode": True,
    }  # fmt: skip
    for one in adapters:
        folder = root / one.name
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text(json.dumps(config))
        save_file(dict(_tensors(one, rank)), folder / "adapter_model.safetensors")
    return [root / one.name for one in adapters]


def _tensors(adapter: Adapter, rank: int) -> Iterator[tuple[str, Tensor]]:
    for module, factors in adapter.factors.items():
        missing = rank - factors.down.shape[0]
        # half of the scale on each side, as PEFT's merges of factors expect
        root = math.sqrt(factors.scale)
        key = f"base_model.model.{module}.lora_"
        yield f"{key}A.weight", functional.pad(root * factors.down.float(), (0, 0, 0, missing))
        yield f"{key}B.weight", functional.pad(root * factors.up.float(), (0, missing)).contiguous()


def peft_arrow(base: Any, folders: Sequence[Path], top_k: int) -> Any:
    """PEFT's Arrow on a base of its own, which it changes."""
    from peft import ArrowConfig, create_arrow_model

    config = ArrowConfig(top_k=top_k, router_temperature=1.0)
    return create_arrow_model(base, [str(folder) for folder in folders], config).train(False)


def peft_merges(base: Any, folders: Sequence[Path]) -> Any:
    """A PeftModel on a base of its own with an adapter for each of `MERGES`."""
    from peft import PeftModel

    torch.manual_seed(0)  # DARE draws
    model = PeftModel.from_pretrained(base, str(folders[0]), adapter_name=folders[0].name)
    for folder in folders[1:]:
        model.load_adapter(str(folder), adapter_name=folder.name)
    names = [folder.name for folder in folders]
    for name, settings in MERGES.items():
        share = 1.0 if name == "merge_ties" else 1 / len(names)
        model.add_weighted_adapter(names, [share] * len(names), name, **settings)
    return model.train(False)


@contextmanager
def merged(model: Any, name: str) -> Iterator[Any]:
    """The PeftModel with one merge active."""
    model.set_adapter(name)
    yield model


def near_duplicate(adapter: Adapter, noise: float = 0.05, seed: int = 0) -> Adapter:
    """The same adapter with a little noise on its factors."""
    generator = torch.Generator().manual_seed(seed)

    def shaken(value: Tensor) -> Tensor:
        value = value.float()
        return value + noise * value.std() * torch.randn(value.shape, generator=generator)

    factors = {
        module: Factors(shaken(one.down), shaken(one.up), one.scale)
        for module, one in adapter.factors.items()
    }
    return Adapter(f"{adapter.name}-again{seed}", factors, adapter.base)


def decoys(like: Sequence[Adapter], count: int) -> list[Adapter]:
    """Adapters of random factors, each of the shapes and sizes of one of the library."""
    return [_decoy(like[number % len(like)], number) for number in range(count)]


def _decoy(like: Adapter, seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)

    def random(value: Tensor) -> Tensor:
        return value.float().std() * torch.randn(value.shape, generator=generator)

    factors = {
        module: Factors(random(one.down), random(one.up), one.scale)
        for module, one in like.factors.items()
    }
    return Adapter(f"decoy{seed}", factors, like.base)
