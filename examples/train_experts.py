"""Trains the eight LoRA experts that expertmix ships, and measures each on every domain.

    python examples/train_experts.py --data ../shared/data --out src/expertmix/assets/experts
    python examples/train_experts.py --data ../shared/data --out /tmp/experts --quick
    python examples/train_experts.py … --out variants --experts python science --ranks 4 16 32

Resumable: state is saved every few steps under --work; a killed run that is started again goes
on from there with the same batches, optimizer and random state. One thread by default, about
5.5 CPU-seconds a step. The result is a folder that `expertmix.models.library.Library` and PEFT
both open, with `library.json` saying how each expert was made and its loss on every domain.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from expert_data import DOMAINS, SEPARATOR, Domain
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from expertmix.models.default import DEFAULT_NAME, default_path

TARGETS = ["gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Settings:
    """How every expert is trained: a batch is `rows` x `length` tokens."""

    rows: int = 8
    length: int = 128
    learning_rate: float = 2e-3
    warmup: int = 6
    heldout_rows: int = 40
    save_every: int = 10
    seed: int = 0


def pack(texts: list[str], tokenizer: Tokenizer, length: int, seed: int) -> Tensor:
    """Shuffles texts, joins them and cuts them into rows: int64 [rows, length]."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(texts), generator=generator).tolist()
    joined = SEPARATOR + SEPARATOR.join(texts[i] for i in order)
    ids = torch.tensor(tokenizer(joined, verbose=False)["input_ids"])
    usable = len(ids) // length * length
    return ids[:usable].view(-1, length)


def batch_at(blocks: Tensor, step: int, settings: Settings) -> Tensor:
    """The batch of a step [rows, length]: a new order of all blocks in every epoch."""
    per_epoch = max(1, len(blocks) // settings.rows)
    epoch, position = divmod(step, per_epoch)
    generator = torch.Generator().manual_seed(settings.seed * 1000 + epoch)
    order = torch.randperm(len(blocks), generator=generator)
    return blocks[order[position * settings.rows : (position + 1) * settings.rows]]


def learning_rate(step: int, steps: int, settings: Settings) -> float:
    """Linear warmup, then half a cosine down to a twentieth."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, steps - settings.warmup)
    return settings.learning_rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))


def adapter_config(domain: Domain) -> LoraConfig:
    """LoRA on the three MLP projections only, so that base MLP + adapter is an MoE expert."""
    return LoraConfig(
        r=domain.rank,
        lora_alpha=2 * domain.rank,
        target_modules=TARGETS,
        task_type="CAUSAL_LM",
        base_model_name_or_path=DEFAULT_NAME,
    )


class Run:
    """One expert in training: the adapter, its optimizer and the step it has reached."""

    def __init__(self, base: PreTrainedModel, domain: Domain, file: Path, seed: int) -> None:
        torch.manual_seed(seed)
        self.domain, self.file, self.step = domain, file, 0
        self.model = get_peft_model(base, adapter_config(domain))
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0)
        self.losses: list[float] = []
        if file.is_file():
            self._load()

    def train_step(self, batch: Tensor, rate: float) -> float:
        """One optimizer step on a batch [rows, length]; returns its loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = self.model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.optimizer.param_groups[0]["params"], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.losses.append(loss.item())
        return self.losses[-1]

    def save(self) -> None:
        """Writes all that a later process needs to go on exactly; never half a file."""
        state = {
            "step": self.step,
            "losses": self.losses,
            "adapter": get_peft_model_state_dict(self.model),
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
        }
        partial = self.file.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.file)

    def _load(self) -> None:
        state = torch.load(self.file, weights_only=True)
        set_peft_model_state_dict(self.model, state["adapter"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        self.step, self.losses = state["step"], state["losses"]


def train(run: Run, blocks: Tensor, settings: Settings) -> None:
    """Trains from wherever the run stands to its domain's number of steps."""
    run.model.train()
    while run.step < run.domain.steps:
        start = time.process_time()
        rate = learning_rate(run.step, run.domain.steps, settings)
        loss = run.train_step(batch_at(blocks, run.step, settings), rate)
        seconds = time.process_time() - start
        print(f"{run.domain.name} step {run.step} loss {loss:.3f} cpu {seconds:.1f}s", flush=True)
        if run.step % settings.save_every == 0 or run.step == run.domain.steps:
            run.save()


@torch.inference_mode()
def mean_loss(model: torch.nn.Module, blocks: Tensor, rows: int) -> float:
    """Mean next-token loss in nats over blocks [N, length]."""
    model.eval()
    parts = torch.split(blocks, rows)
    losses = [float(model(input_ids=part, labels=part).loss) for part in parts]
    return sum(losses) / len(losses)


def save_adapter(run: Run, out: Path) -> None:
    """Writes the adapter in PEFT's format, bfloat16, naming no path of this machine."""
    folder = out / run.domain.name
    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(run.model)
    tensors = {key: value.to(torch.bfloat16).contiguous() for key, value in state.items()}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = adapter_config(run.domain)
    config.inference_mode = True
    config.save_pretrained(folder)


def heldout_blocks(data: Path, tokenizer: Tokenizer, settings: Settings) -> dict[str, Tensor]:
    """Per domain, blocks [heldout_rows, length] that no expert was trained on."""
    seen = {text for domain in DOMAINS for text in domain.train(data)}
    blocks = {}
    for domain in DOMAINS:
        texts = [text for text in domain.heldout(data) if text not in seen]
        rows = pack(texts, tokenizer, settings.length, settings.seed)
        blocks[domain.name] = rows[: settings.heldout_rows]
    return blocks


def losses_on(model: torch.nn.Module, heldout: dict[str, Tensor], rows: int) -> dict[str, float]:
    """Loss per domain, in nats per token."""
    return {name: round(mean_loss(model, part, rows), 4) for name, part in heldout.items()}


def describe(domain: Domain, run: Run, settings: Settings) -> dict[str, Any]:
    """One expert's entry in library.json."""
    return {
        "name": domain.name,
        "rank": domain.rank,
        "alpha": 2 * domain.rank,
        "training_data": domain.source,
        "licence_of_data": domain.licence,
        "steps": run.step,
        "tokens": run.step * settings.rows * settings.length,
        "seed": settings.seed,
        "final_training_loss": round(sum(run.losses[-10:]) / len(run.losses[-10:]), 4),
    }


def make_expert(
    base: PreTrainedModel, domain: Domain, blocks: Tensor, args: argparse.Namespace, s: Settings
) -> dict[str, Any]:
    """Trains one expert, saves its adapter, and returns its entry; leaves `base` as it was."""
    run = Run(base, domain, args.work / f"{domain.name}.pt", s.seed)
    train(run, blocks, s)
    save_adapter(run, args.out)
    run.model.unload()
    return describe(domain, run, s)


def measure(
    base: PreTrainedModel, name: str, out: Path, heldout: dict[str, Tensor], rows: int
) -> dict[str, float]:
    """Held-out losses of one saved adapter, read back from its bfloat16 file."""
    domain = next(domain for domain in DOMAINS if domain.name == name)
    model = get_peft_model(base, adapter_config(domain))
    set_peft_model_state_dict(model, load_file(out / name / "adapter_model.safetensors"))
    losses = losses_on(model, heldout, rows)
    model.unload()
    print(name, losses, flush=True)
    return losses


def quick(domains: list[Domain]) -> list[Domain]:
    """The same domains with two steps each: a smoke test."""
    return [Domain(**{**vars(domain), "steps": 2}) for domain in domains]


def variants(domains: list[Domain], ranks: list[int]) -> list[Domain]:
    """The same domains at other ranks, each under a name of its own."""
    return [
        Domain(**{**vars(domain), "name": f"{domain.name}-r{rank}", "rank": rank})
        for domain in domains
        for rank in ranks
    ]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished library")
    parser.add_argument("--work", type=Path, default=Path("runs/experts"), help="resumable state")
    parser.add_argument("--experts", nargs="*", help="train only these, measure nothing")
    parser.add_argument("--ranks", nargs="*", type=int, help="variants NAME-rRANK of those instead")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="two steps each")
    return parser.parse_args()


def main() -> None:
    """Trains, measures, and writes library.json last."""
    args = parse()
    torch.set_num_threads(args.threads)
    settings = Settings(heldout_rows=2) if args.quick else Settings()
    args.work = args.work / "quick" if args.quick else args.work
    args.work.mkdir(parents=True, exist_ok=True)
    chosen = [d for d in DOMAINS if not args.experts or d.name in args.experts]
    if args.ranks:
        chosen = variants(chosen, args.ranks)
    tokenizer = AutoTokenizer.from_pretrained(default_path())
    base = AutoModelForCausalLM.from_pretrained(default_path(), dtype=torch.bfloat16)
    base.name_or_path = DEFAULT_NAME  # what PEFT writes into adapter_config.json
    entries = []
    for domain in quick(chosen) if args.quick else chosen:
        blocks = pack(domain.train(args.data), tokenizer, settings.length, settings.seed)
        entries.append(make_expert(base, domain, blocks, args, settings))
    if args.experts or args.ranks:
        return
    heldout = heldout_blocks(args.data, tokenizer, settings)
    matrix = {"base": losses_on(base, heldout, settings.rows)}
    for domain in DOMAINS:
        matrix[domain.name] = measure(base, domain.name, args.out, heldout, settings.rows)
    library = {"base": DEFAULT_NAME, "experts": entries, "heldout_loss": matrix}
    (args.out / "library.json").write_text(json.dumps(library, indent=1) + "\n")


if __name__ == "__main__":
    main()
