"""Fits the routers of the default MoE, and measures them on held-out text of every domain.

    python examples/fit_routers.py --out src/expertmix/assets/routers.safetensors

No training run: every layer's router is a regression of the MLP's input on the domain (see
`expertmix.models.fitting`). The eight experts' texts come from their own training splits. The
base's texts are what the base itself writes when it is asked everyday things, so that it serves
what it serves best. Prints held-out loss per domain for the base, a random router, the fitted
router, and each domain's own expert alone (oracle), and how often the own expert is chosen.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from expert_data import DOMAINS, SEPARATOR, Domain
from torch import Tensor
from train_experts import Settings, heldout_blocks, mean_loss

from expertmix.models.default import load_default
from expertmix.models.fitting import Routers, fit_routers, random_routers, save_routers
from expertmix.models.library import Library
from expertmix.models.mixtral import expert_names
from expertmix.models.unmerged import Decide, routed

PIECE = 600  # characters: about one row of 128 tokens

# Written for this project: everyday requests that belong to none of the eight domains.
REQUESTS = (
    "Hello! How are you today?",
    "Write a short e-mail that thanks a colleague for her help.",
    "Give me three ideas for a birthday present for my brother.",
    "How do I make pancakes?",
    "Plan a weekend in a small town by the sea.",
    "What should I pack for a hike in the rain?",
    "Write a friendly note to my new neighbors.",
    "How can I sleep better?",
    "Suggest a name for a grey cat and say why.",
    "How do I remove a coffee stain from a shirt?",
    "Write a short story about a lighthouse keeper.",
    "Describe your favorite season.",
    "How do I ask my manager for a day off?",
    "Give me tips for a job interview.",
    "What can I cook with rice, eggs and spinach?",
    "Write an invitation to a garden party.",
    "How do I keep my houseplants alive?",
    "Explain to a child why we share our toys.",
    "Write a product description for a wooden chair.",
    "How can I learn to play the guitar?",
    "Give me a plan to tidy up my flat.",
    "Write a polite reply to an angry customer.",
    "What makes a good friend?",
    "Recommend a board game for four people.",
    "How do I start a running routine?",
    "Write a slogan for a small bakery.",
    "What is a good way to say sorry?",
    "Describe a busy market on a Saturday morning.",
    "How do I choose a bicycle?",
    "Write a toast for a wedding.",
    "How can I save money on groceries?",
    "Tell me a joke about a tired robot.",
    "Write a diary entry of a day at the lake.",
    "How should I prepare for a long train ride?",
    "What are good habits for working at home?",
    "Write a message that moves our meeting to Friday.",
    "How do I teach my dog to sit?",
    "Describe a perfect breakfast.",
    "Write a postcard from the mountains.",
    "How do I say no without being rude?",
)


def pieces(texts: list[str], count: int, seed: int) -> list[str]:
    """Pieces of about one row: half begin where a text begins, half anywhere."""
    shuffled = random.Random(seed).sample(texts, len(texts))
    half = len(shuffled) // 2
    stream = SEPARATOR.join(shuffled[half:])
    anywhere = (stream[i : i + PIECE] for i in range(0, len(stream) - PIECE, PIECE))
    both = zip(beginnings(shuffled[:half]), anywhere, strict=False)
    return [piece for pair in both for piece in pair][:count]


def beginnings(texts: list[str]) -> Iterator[str]:
    """As many texts as fill a piece, joined and cut to it."""
    joined = ""
    for text in texts:
        joined += text + SEPARATOR
        if len(joined) >= PIECE:
            yield joined[:PIECE]
            joined = ""


@torch.inference_mode()
def base_texts(model: Any, tokenizer: Any, seed: int, answers: int = 2) -> list[str]:
    """What the base answers to everyday requests, sampled from a seed."""
    torch.manual_seed(seed)
    tokenizer.padding_side = "left"
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": request}], tokenize=False, add_generation_prompt=True
        )
        for request in REQUESTS * answers
    ]
    batches = [prompts[i : i + 20] for i in range(0, len(prompts), 20)]
    texts = [text for batch in batches for text in write(batch, model, tokenizer)]
    tokenizer.padding_side = "right"
    return texts


def write(prompts: list[str], model: Any, tokenizer: Any, tokens: int = 128) -> list[str]:
    """Prompts and their sampled answers."""
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    ids = model.generate(**batch, max_new_tokens=tokens, do_sample=True, top_p=0.95)
    new = ids[:, batch["input_ids"].shape[1] :]
    answers = tokenizer.batch_decode(new, skip_special_tokens=True)
    return [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]


def fixed(routers: Routers) -> Decide:
    """Routers as a decision, rounded to bfloat16 as in the saved MoE."""
    rounded = {layer: weight.to(torch.bfloat16).float() for layer, weight in routers.items()}
    return lambda layer, x_TH: x_TH @ rounded[layer].T


class Share:
    """Wraps a decision and counts the weight that each expert gets over all layers."""

    def __init__(self, decide: Decide, top_k: int) -> None:
        self._decide, self._top_k = decide, top_k
        self.total: Tensor | None = None

    def __call__(self, layer: int, x_TH: Tensor) -> Tensor:
        """Decides as the wrapped decision does."""
        logits_TE = self._decide(layer, x_TH)
        top = logits_TE.softmax(-1).topk(self._top_k)
        weights = top.values / top.values.sum(-1, keepdim=True)
        mass_E = torch.zeros_like(logits_TE).scatter(1, top.indices, weights).mean(0)
        self.total = mass_E if self.total is None else self.total + mass_E
        return logits_TE


def measure(
    model: Any, library: Library, decide: Decide, blocks: Tensor, top_k: int = 2
) -> tuple[float, Tensor]:
    """Held-out loss under a decision, and each expert's mean weight [E]."""
    share = Share(decide, top_k)
    with routed(model, library, share, top_k=top_k):
        loss = mean_loss(model, blocks, 8)
    assert share.total is not None
    return loss, share.total / share.total.sum()


def table(model: Any, library: Library, routers: Routers, data: Path, tokenizer: Any) -> Any:
    """Per domain: loss of base, random router and fitted router, and the experts' shares."""
    names = expert_names(library)
    control = random_routers(model.config, len(names))
    rows = {}
    for name, blocks in heldout_blocks(data, tokenizer, Settings()).items():
        loss, share = measure(model, library, fixed(routers), blocks)
        rows[name] = {
            "base": round(mean_loss(model, blocks, 8), 4),
            "random": round(measure(model, library, fixed(control), blocks)[0], 4),
            "moe": round(loss, 4),
            "own": library.about["heldout_loss"][name][name],
            "share": {n: round(s, 3) for n, s in zip(names, share.tolist(), strict=True)},
        }
        print(name, json.dumps(rows[name]), flush=True)
    return rows


def calibration(domains: tuple[Domain, ...], data: Path, count: int) -> dict[str, list[str]]:
    """The experts' texts, from the splits they were trained on."""
    return {domain.name: pieces(domain.train(data), count, seed=1) for domain in domains}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--library", type=Path, default=Path("src/expertmix/assets/experts"))
    parser.add_argument("--out", type=Path, required=True, help="file of the fitted routers")
    parser.add_argument("--results", type=Path, help="also write the table here, as JSON")
    parser.add_argument("--method", default="logistic", choices=["logistic", "ridge"])
    parser.add_argument("--rows", type=int, default=100, help="rows of 128 tokens per expert")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    """Fits, saves and measures."""
    args = parse()
    torch.set_num_threads(args.threads)
    model, tokenizer = load_default()
    library = Library.open(args.library)
    texts = calibration(DOMAINS, args.data, args.rows)
    texts["base"] = base_texts(model, tokenizer, seed=0)
    routers = fit_routers(
        model, tokenizer, library, texts, method=args.method, rows=args.rows,
        progress=lambda stage, done, total: print(stage, done, "of", total, flush=True),
    )  # fmt: skip
    save_routers(args.out, routers, expert_names(library))
    rows = table(model, library, routers, args.data, tokenizer)
    if args.results:
        args.results.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
