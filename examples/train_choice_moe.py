"""Trains a small OLMoE from nothing on generated multiple-choice questions, and tests it.

    python examples/train_choice_moe.py --out runs/choice-moe
    python examples/train_choice_moe.py --out some/folder --work some/state --quick

The model reads rows of documents; a document is one to three questions of a family, each with its
right answer, and an end. So it has seen questions alone and with solved ones before them. Tokens of
answers weigh 1 in the loss, all others `stem_weight`.

Resumable: state is saved every few steps under --work; a killed run that is started again ends bit
for bit like one that was never stopped, as batches depend on nothing but seed and step. The folder
--out gets the model, its tokenizer, and reference.jsonl (plain questions that were not trained
on), development.jsonl and test.jsonl (shifted ones). About 2400 tokens a second on one thread: 27
minutes. Knows no routing method.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from choice_families import FAMILIES, LEARNED, Question, Split, questions, stream
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, OlmoeConfig, OlmoeForCausalLM
from transformers import PreTrainedTokenizerFast as Fast

PAD, END = "<|pad|>", "<|endoftext|>"
BETWEEN = "\n\n"  # questions of one document
# Digits and letters that stand alone keep their blank: " 1" is the first token of " 12".
PIECES = Regex(r" ?\p{L}+| ?\p{N}|\n+| ?[^\s\p{L}\p{N}]+|\s")


@dataclass(frozen=True)
class Settings:
    """Sizes of the model, and how it is trained: a batch is `rows` x `length` tokens."""

    steps: int = 3000
    seed: int = 0
    hidden: int = 192
    layers: int = 8
    heads: int = 6
    experts: int = 32
    top_k: int = 4
    width: int = 64
    rows: int = 8
    length: int = 160
    learning_rate: float = 2e-3
    warmup: int = 150
    cosine: int = 5000  # the rate decays as if this many steps came, or `steps` if those are more
    stem_weight: float = 0.1
    save_every: int = 200
    reference: int = 300
    development: int = 100
    test: int = 120


QUICK: dict[str, int] = {
    "steps": 4, "hidden": 32, "layers": 2, "heads": 2, "experts": 4, "top_k": 2, "width": 16,
    "rows": 2, "save_every": 2, "reference": 4, "development": 4, "test": 4,
}  # fmt: skip


def build_tokenizer(seed: int) -> Fast:
    """Byte-level BPE learned from plain questions; what it has never seen falls back to bytes."""
    texts = [f"{one.stem} {one.answer}" for one in questions("train", 400, seed)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(PIECES, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        min_frequency=4,
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return Fast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END
    )


def build_model(s: Settings, tokenizer: Fast) -> OlmoeForCausalLM:
    """A new model, initialized from the seed."""
    torch.manual_seed(s.seed)
    config = OlmoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=s.hidden,
        intermediate_size=s.width,
        num_hidden_layers=s.layers,
        num_attention_heads=s.heads,
        num_key_value_heads=s.heads,
        num_experts=s.experts,
        num_experts_per_tok=s.top_k,
        max_position_embeddings=512,
        router_aux_loss_coef=0.01,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model: OlmoeForCausalLM = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        config, experts_implementation="grouped_mm"
    )
    return model


def document(rng: random.Random) -> Iterator[tuple[str, bool]]:
    """Pieces of a document, each with whether it is an answer: 1 to 3 questions of a family."""
    asked = stream(rng.choice(tuple(FAMILIES)), "train", rng)
    for i in range(rng.choice((1, 1, 2, 3))):
        question = next(asked)
        yield (BETWEEN if i else "") + question.stem, False
        yield f" {question.answer}", True


def encode(tokenizer: Fast, rng: random.Random) -> tuple[list[int], list[bool]]:
    """Tokens of one document and its end, and which of them belong to answers."""
    ids, answers = list[int](), list[bool]()
    for text, is_answer in document(rng):
        piece = tokenizer(text)["input_ids"]
        ids += piece
        answers += [is_answer] * len(piece)
    return [*ids, tokenizer.eos_token_id], [*answers, False]


def fill(tokenizer: Fast, rng: random.Random, s: Settings) -> tuple[list[int], list[float]]:
    """Tokens of a row and their loss weights: documents, until four in a row do not fit."""
    ids, weights, misses = list[int](), list[float](), 0
    while misses < 4:
        tokens, answers = encode(tokenizer, rng)
        if len(ids) + len(tokens) > s.length:
            misses += 1
            continue
        ids += tokens
        weights += [1.0 if one else s.stem_weight for one in answers]
        misses = 0
    return ids, weights


def batch_at(tokenizer: Fast, step: int, s: Settings) -> tuple[Tensor, Tensor]:
    """The batch of a step: ids and loss weights, each [rows, length]; padding weighs nothing."""
    rng = random.Random(f"{s.seed} train {step}")
    ids_RL = torch.full((s.rows, s.length), tokenizer.pad_token_id)
    weights_RL = torch.zeros(s.rows, s.length)
    for row in range(s.rows):
        ids, weights = fill(tokenizer, rng, s)
        ids_RL[row, : len(ids)] = torch.tensor(ids)
        weights_RL[row, : len(ids)] = torch.tensor(weights)
    return ids_RL, weights_RL


def learning_rate(step: int, s: Settings) -> float:
    """Linear warmup, then half a cosine down to a fiftieth, of which a short run sees a part."""
    if step < s.warmup:
        return s.learning_rate * (step + 1) / s.warmup
    done = (step - s.warmup) / max(1, max(s.cosine, s.steps) - s.warmup)
    return s.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


class Run:
    """A model in training: its optimizer, the step it has reached, its losses."""

    def __init__(self, s: Settings, file: Path) -> None:
        self.settings, self.file, self.step = s, file, 0
        self.tokenizer = build_tokenizer(s.seed)
        self.model = build_model(s, self.tokenizer)
        self.losses: list[float] = []
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        others = [p for p in self.model.parameters() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0}]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)
        if file.is_file():
            self._load()

    def identity(self) -> dict[str, Any]:
        """What a state must have been made with to be gone on from."""
        made = hashlib.sha256(self.tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
        return {**asdict(self.settings), "tokenizer": made}

    def train_step(self) -> float:
        """One optimizer step; returns the mean loss of the answer and stem tokens, weighted."""
        ids, weights = batch_at(self.tokenizer, self.step, self.settings)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.settings)
        mask = (weights > 0).long()  # padding takes no part in the balance of experts
        out = self.model(input_ids=ids, attention_mask=mask, output_router_logits=True)
        each = cross_entropy(out.logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
        loss = (each * weights[:, 1:]).sum() / weights[:, 1:].sum()
        (loss + self.model.config.router_aux_loss_coef * out.aux_loss).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.losses.append(loss.item())
        return self.losses[-1]

    def save(self) -> None:
        """Writes all that a later process needs to go on exactly; never half a file."""
        state = {
            "identity": self.identity(),
            "step": self.step,
            "losses": self.losses,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.file.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.file)

    def _load(self) -> None:
        state = torch.load(self.file, weights_only=True)
        if state["identity"] != self.identity():
            raise SystemExit(f"{self.file} is the state of another run: choose another --work")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.losses = state["step"], state["losses"]


def train(run: Run) -> None:
    """Trains from wherever the run stands to its last step."""
    s, start, first = run.settings, time.perf_counter(), run.step
    run.model.train()
    while run.step < s.steps:
        run.train_step()
        if run.step % 50 == 0 or run.step == s.steps:
            speed = (run.step - first) * s.rows * s.length / (time.perf_counter() - start)
            recent = run.losses[-50:]
            print(
                f"step {run.step} loss {sum(recent) / len(recent):.3f} {speed:.0f} tokens/s",
                flush=True,
            )
        if run.step % s.save_every == 0 or run.step == s.steps:
            run.save()


@torch.inference_mode()
def log_likelihoods(model: OlmoeForCausalLM, tokenizer: Fast, part: Sequence[Question]) -> Tensor:
    """Of " choice" after the stem, summed over its tokens: [questions, 4]."""
    stems = [tokenizer(one.stem)["input_ids"] for one in part]
    ends = [[tokenizer(f" {choice}")["input_ids"] for choice in one.choices] for one in part]
    rows = [stem + end for stem, four in zip(stems, ends, strict=True) for end in four]
    width = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
    # Padding stands to the right of all that is read, so causal attention needs no mask.
    logs = model(input_ids=ids[:, :-1], use_cache=False).logits.log_softmax(-1)
    each = logs.gather(-1, ids[:, 1:, None])[..., 0]
    spans = [
        (len(stem) - 1, len(end)) for stem, four in zip(stems, ends, strict=True) for end in four
    ]
    sums = [one[start : start + size].sum() for one, (start, size) in zip(each, spans, strict=True)]
    return torch.stack(sums).view(len(part), 4)


def accuracies(
    model: OlmoeForCausalLM, tokenizer: Fast, asked: Sequence[Question]
) -> dict[str, float]:
    """Share of right answers by family, and over all."""
    model.train(False)
    order = sorted(asked, key=lambda one: len(one.stem))
    right: dict[str, list[bool]] = {name: [] for name in (*FAMILIES, "all")}
    for start in range(0, len(order), 32):
        part = order[start : start + 32]
        best = log_likelihoods(model, tokenizer, part).argmax(1).tolist()
        for one, chosen in zip(part, best, strict=True):
            right[one.family].append(chosen == one.gold)
            right["all"].append(chosen == one.gold)
    return {name: sum(hits) / len(hits) for name, hits in right.items() if hits}


def write_data(out: Path, s: Settings) -> dict[Split, list[Question]]:
    """Writes the rows of every split but the training one, of the families that are learned."""
    sizes: dict[Split, int] = {
        "reference": s.reference, "development": s.development, "test": s.test,
    }  # fmt: skip
    splits = {split: questions(split, number, s.seed, LEARNED) for split, number in sizes.items()}
    for split, asked in splits.items():
        lines = [json.dumps(one.row()) + "\n" for one in asked]
        (out / f"{split}.jsonl").write_text("".join(lines))
    return splits


def finish(run: Run, out: Path) -> None:
    """Writes the folder, and tells how often the model is right."""
    out.mkdir(parents=True, exist_ok=True)
    splits = write_data(out, run.settings)
    run.tokenizer.save_pretrained(out)
    run.model.save_pretrained(out)
    found = {name: accuracies(run.model, run.tokenizer, rows) for name, rows in splits.items()}
    print(f"{'family':12}" + "".join(f"{name:>13}" for name in found))
    for family in found["reference"]:
        print(f"{family:12}" + "".join(f"{table[family]:13.3f}" for table in found.values()))


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished model")
    parser.add_argument("--work", type=Path, default=Path("runs/choice-moe-state"))
    parser.add_argument("--steps", type=int, help=f"default {Settings.steps}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a few steps of a tiny model")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Trains, writes the folder, and measures."""
    args = parse(words)
    torch.set_num_threads(args.threads)
    sizes = QUICK if args.quick else {}
    steps = {} if args.steps is None else {"steps": args.steps}
    settings = Settings(**{**sizes, **steps, "seed": args.seed})
    run = Run(settings, args.work / "training.pt")
    train(run)
    finish(run, args.out)


if __name__ == "__main__":
    main()
