"""What routing LoRA adapters costs: base, one PEFT adapter, PEFT's Arrow, a naive loop, and fused.

Prints `name: value` lines, on a random Llama of SmolLM2-135M's shape with fewer layers (and a
vocabulary smaller in proportion). Times are process CPU time on one thread, all contestants of a
figure measured in turn in one process, medians of several rounds, so that a loaded machine blurs
all alike: read the ratios. `…_share_of_one` is our speed by that of one unmerged PEFT adapter,
`…_over_peft_arrow` and `…_over_naive_loop` are how many times faster we are. `fused` is exact;
`fused_bf16` projects a float32 model's inputs in bfloat16, which decides `…_flips_bf16` of the
selected slots otherwise.

    python benchmarks/compose.py [--quick] [--save]
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import figures
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from expertmix.core.record import record
from expertmix.experts.composed import Composed
from expertmix.experts.peft_folder import read_library
from expertmix.experts.shelf import Shelf
from expertmix.routers.spectr import SpectR

TOP_K = 3
Run = Callable[[], object]
Block = Callable[[], AbstractContextManager[object]]
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Case:
    """Which modules the adapters adapt, and at which rank."""

    name: str
    targets: tuple[str, ...]
    rank: int


CASES = (Case("qv8", ("q_proj", "v_proj"), 8), Case("all16", ALL, 16))


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    layers: int
    rounds: int
    steps: int


COUNTS = (8, 32, 100)
QUICK = Size(layers=1, rounds=3, steps=8)
FULL = Size(layers=6, rounds=7, steps=32)


def measure(size: Size) -> Iterator[tuple[str, float]]:
    """All figures, in the order in which they are printed."""
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            library = write_library(Path(folder), case, max(COUNTS), size.layers)
            for count in COUNTS:
                yield from compared(case, library[:count], size)


def compared(case: Case, library: Sequence[Path], size: Size) -> Iterator[tuple[str, float]]:
    """One shelf: loading, prefill of 4 × 128 tokens, decoding of 4 sequences."""
    mark = f"{case.name}_E{len(library)}"
    field = enter(library, size)
    for name, seconds in field.loading.items():
        yield f"{mark}_load_{name}_cpu_s", seconds
    for phase in ("prefill", "decode"):
        times = in_turn(field.contestants, phase, size)
        for name, seconds in times.items():
            yield f"{mark}_{phase}_{name}_cpu_ms", 1000 * seconds
        for ours in ("fused", "fused_bf16"):
            yield f"{mark}_{phase}_{ours}_share_of_one", times["one_adapter"] / times[ours]
            yield f"{mark}_{phase}_{ours}_over_naive_loop", times["naive_loop"] / times[ours]
            yield f"{mark}_{phase}_{ours}_over_peft_arrow", times["peft_arrow"] / times[ours]
    yield f"{mark}_flips_bf16", flips(field)


@dataclass(frozen=True)
class Contestant:
    """A model, and the block inside of which it is what it is called."""

    model: Any
    block: Block


@dataclass(frozen=True)
class Field:
    """All contestants, what loading took in CPU seconds, and our shelf."""

    contestants: dict[str, Contestant]
    loading: dict[str, float]
    shelf: Shelf


def enter(library: Sequence[Path], size: Size) -> Field:
    """Load a library in all ways; what is ours shares the base's weights."""
    base = llama(size.layers)
    read_s, adapters = timed(lambda: list(read_library(library)))
    spectra_s, shelf = timed(lambda: Shelf.of(adapters))
    peft_s, rival = timed(lambda: peft_arrow(library, size))
    contestants = {
        "base": Contestant(base, nullcontext),
        "one_adapter": Contestant(one_adapter(library[0], size), nullcontext),
        "peft_arrow": Contestant(rival, nullcontext),
        "naive_loop": Contestant(base, lambda: naive_loop(base, library)),
        "fused": Contestant(base, lambda: composed(base, shelf)),
        "fused_bf16": Contestant(base, lambda: composed(base, shelf, torch.bfloat16)),
    }
    return Field(contestants, {"peft": peft_s, "read": read_s, "spectra": spectra_s}, shelf)


def composed(base: Any, shelf: Shelf, projections: torch.dtype | None = None) -> Composed:
    """Ours."""
    return Composed(base, shelf, SpectR(top_k=TOP_K), projections=projections)


def flips(field: Field) -> float:
    """Share of the selected adapters that bfloat16 projections select otherwise."""
    base, found = field.contestants["base"].model, []
    for projections in (None, torch.bfloat16):
        with composed(base, field.shelf, projections) as ours, torch.no_grad():
            with record(ours) as trace:
                base(tokens(1, 128))
            found.append([trace[site].chosen() for site in trace.sites])
    changed = sum(int((a & ~b).sum()) for a, b in zip(*found, strict=True))
    return changed / sum(int(chosen.sum()) for chosen in found[0])


def in_turn(contestants: Mapping[str, Contestant], phase: str, size: Size) -> dict[str, float]:
    """Median CPU seconds per prefill, or per decoding step, of each contestant."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(size.rounds):
        for name, contestant in contestants.items():
            run = prefill if phase == "prefill" else decode
            with torch.no_grad(), contestant.block():
                times[name].append(run(contestant.model, size.steps))
    return {name: statistics.median(found) for name, found in times.items()}


def prefill(model: Any, steps: int) -> float:
    """CPU seconds of one pass over 4 × 128 tokens, after one that warms up."""
    model(tokens(4, 128))
    return timed(lambda: model(tokens(4, 128)))[0]


def decode(model: Any, steps: int) -> float:
    """CPU seconds per step of decoding 4 sequences with a cache."""
    cache = model(tokens(4, 16), use_cache=True).past_key_values

    def run() -> None:
        for _ in range(steps):
            model(tokens(4, 1), past_key_values=cache, use_cache=True)

    return timed(run)[0] / steps


def timed(run: Run) -> tuple[float, Any]:
    """CPU seconds of this process, and what came out."""
    start = time.process_time()
    result = run()
    return time.process_time() - start, result


def tokens(rows: int, columns: int) -> Tensor:
    """Random token ids."""
    return torch.randint(3, 500, (rows, columns), generator=torch.Generator().manual_seed(1))


def llama(layers: int) -> Any:
    """Random weights in the shape of SmolLM2-135M."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152 * layers // 30,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).train(False)


def write_library(root: Path, case: Case, count: int, layers: int) -> list[Path]:
    """Random adapters as PEFT stores them."""
    from peft import LoraConfig

    config = LoraConfig(
        r=case.rank, lora_alpha=16, target_modules=list(case.targets), task_type="CAUSAL_LM"
    )
    settings = json.dumps(
        {key: sorted(v) if isinstance(v, set) else v for key, v in config.to_dict().items()},
        default=str,
    )
    linears = {
        path: module
        for path, module in llama(layers).named_modules()
        if path.rpartition(".")[2] in case.targets
    }
    return [
        _write(root / f"a{number:04}", number, linears, case, settings) for number in range(count)
    ]


def _write(folder: Path, seed: int, linears: Mapping[str, Any], case: Case, settings: str) -> Path:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for path, linear in linears.items():
        key = f"base_model.model.{path}.lora_"
        down = torch.randn(case.rank, linear.in_features, generator=generator)
        up = torch.randn(linear.out_features, case.rank, generator=generator)
        tensors[f"{key}A.weight"], tensors[f"{key}B.weight"] = 0.04 * down, 0.02 * up
    folder.mkdir()
    (folder / "adapter_config.json").write_text(settings)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def one_adapter(folder: Path, size: Size) -> Any:
    """PEFT with one unmerged adapter."""
    from peft import PeftModel

    return PeftModel.from_pretrained(llama(size.layers), str(folder)).train(False)


def peft_arrow(library: Sequence[Path], size: Size) -> Any:
    """PEFT's own Arrow over the library."""
    from peft import ArrowConfig, create_arrow_model

    paths = [str(folder) for folder in library]
    config = ArrowConfig(top_k=TOP_K, router_temperature=1.0)
    return create_arrow_model(llama(size.layers), paths, config).train(False)


@contextmanager
def naive_loop(model: nn.Module, library: Sequence[Path]) -> Iterator[None]:
    """Projection scores, and then adapter after adapter, at every module."""
    adapters = list(read_library(library))
    with ExitStack() as stack:
        for path, module in model.named_modules():
            factors = [one.factors[path] for one in adapters if path in one.factors]
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


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    figures.run("compose", __doc__, "fewer layers", lambda quick: measure(QUICK if quick else FULL))
