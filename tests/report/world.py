"""A synthetic recording with domain structure: experts that mostly serve the text of their name."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from expertmix.core.decision import Decision
from expertmix.core.site import Site, SiteInfo
from expertmix.core.tokens import Tokens
from expertmix.core.trace import Chunk, Memory, Trace, TraceMeta
from expertmix.report import Effect, Table

TEXTS = {
    "maths": "A baker sells 14 loaves in the morning and twice as many in the afternoon. Each loaf "
    "costs $3. How much does she earn in a day? In the afternoon she sells 14 * 2 = 28 loaves. "
    "Together that is 14 + 28 = 42 loaves. She earns 42 * 3 = 126 dollars. #### 126",
    "python": "def longest_word(text: str) -> str:\n    words = text.split()\n    if not words:\n"
    "        return ''\n    return max(words, key=len)\n\n\n"
    "assert longest_word('a bb ccc') == 'ccc'\n"
    "for line in open('notes.txt'):\n    print(line.strip().lower(), end=', ')",
    "medicine": "Does early mobilization shorten the stay in intensive care? We followed 212 adult "
    "patients after abdominal surgery. The median stay fell from six to four days. No difference "
    "in readmission was seen. Early mobilization appears to be safe and effective.",
    "shakespeare": "Good morrow, gentle sir; what news from the north? The king hath sent his "
    "trumpets to the shore, and every man that bears a sword this night shall dream of banners and "
    "of drowned light. O weary crown, that sits so heavy on so young a brow!",
    "science": "Question: Which of these is the best conductor of heat? A: wood B: copper C: wool "
    "D: cork. Copper is a metal, and metals let heat pass quickly, so the answer is B. Question: "
    "What do green plants take from the air when they grow? A: oxygen B: carbon dioxide",
    "reading": "The lighthouse at Cold Point was built in 1871 and was kept by the same family for "
    "sixty years. It was switched off in 1988 and is now a small museum. Question: is the "
    "lighthouse at Cold Point still in use? Answer: no",
    "encyclopedia": " = The Bronze Bridge = \n The Bronze Bridge is a footbridge over the river "
    "Aller . It was completed in 1904 to a design by the engineer Carl Lund , and is 84 metres "
    "( 276 ft ) long . In 1952 it was widened and its lamps were replaced .",
    "backward": "If we know the answer to the question is 126, what is the value of the unknown "
    "variable x? A baker sells x loaves in the morning and twice as many in the afternoon. Then "
    "x + 2x = 3x loaves are sold, so 9x = 126 and x = 14. The answer is: 14",
}  # fmt: skip
NAMES = tuple(TEXTS)
_PIECE = re.compile(r"\n| ?[A-Za-z']{1,7}| ?\d| ?[^\sA-Za-z\d]|\s+")
_BYTE_LEVEL = str.maketrans({" ": "Ġ", "\n": "Ċ"})


def make_infos(
    layers: int, experts: int, top_k: int, names: tuple[str, ...] = ()
) -> tuple[SiteInfo, ...]:
    """Like a Mixtral."""
    return tuple(
        SiteInfo(Site(f"model.layers.{layer}.mlp"), experts, top_k, names)
        for layer in range(layers)
    )


def tokenized(text: str) -> list[str]:
    """Pieces, written as byte-level vocabularies write them."""
    return [piece.translate(_BYTE_LEVEL) for piece in _PIECE.findall(text)]


def decide(
    info: SiteInfo, layer: float, domain_N: torch.Tensor, generator: torch.Generator
) -> Decision:
    """Experts by domain, more clearly in the middle of the model; one expert is in fashion late."""
    experts = info.num_experts
    logits_NE = torch.randn(len(domain_N), experts, generator=generator)
    pull = 1.2 + 3.6 * (1 - (2 * layer - 1) ** 2)
    favorite_N = (domain_N * max(1, experts // len(NAMES))) % experts
    logits_NE[torch.arange(len(domain_N)), favorite_N] += pull
    logits_NE[:, -1] += 1.6 * layer
    top = logits_NE.softmax(-1).topk(info.top_k, dim=-1)
    weights = top.values / top.values.sum(-1, keepdim=True)
    return Decision(top.indices, weights, experts, logits_NE)


def make_chunk(
    infos: Sequence[SiteInfo], sample: int, label: str | None, pieces: list[str], *, text: bool
) -> Chunk:
    """One sample, with two tokens of padding in front."""
    generator = torch.Generator().manual_seed(sample)
    padded = ["<pad>", "<pad>", *pieces]
    size = len(padded)
    real = torch.arange(size) >= 2
    position = torch.where(real, torch.arange(size) - 2, -1)
    tokens = Tokens(torch.full((size,), sample), position, torch.arange(size), real)
    domain_N = torch.full((size,), NAMES.index(label) if label in NAMES else 0)
    last = max(1, len(infos) - 1)
    decisions = {
        info.site: decide(info, layer / last, domain_N, generator)
        for layer, info in enumerate(infos)
    }
    labels = {} if label is None else {sample: label}
    return Chunk(tokens, decisions, labels, tuple(padded) if text else None)


def make_trace(
    infos: Sequence[SiteInfo],
    texts: dict[str, str] | None = None,
    *,
    text: bool = True,
    labels: bool = True,
    repeats: int = 1,
) -> Trace:
    """A chunk per text."""
    chunks = [
        make_chunk(infos, sample, name if labels else None, tokenized(words) * repeats, text=text)
        for sample, (name, words) in enumerate((TEXTS if texts is None else texts).items())
    ]
    meta = TraceMeta(
        "0123456789abcdef" * 4,
        "expertmix/embedded-default",
        tuple(infos),
        settings={"dtype": "bfloat16"},
        versions={"expertmix": "0.1.0"},
        created="2026-07-01T12:00:00+00:00",
    )
    return Trace(meta, Memory(chunks))


def named_trace(layers: int = 30, *, text: bool = True) -> Trace:
    """The embedded default: eight experts with names, two per token."""
    return make_trace(make_infos(layers, 8, 2, NAMES), text=text)


def make_effects() -> list[Effect]:
    """Each expert ablated and masked, on each text."""
    generator = torch.Generator().manual_seed(0)
    noise = iter(torch.rand(400, generator=generator).tolist())
    effects = []
    for kind, size in (("ablate", 0.9), ("mask", 0.25)):
        for expert in NAMES:
            for label in NAMES:
                base = 2 + 0.6 * NAMES.index(label) / 8
                harm = size * next(noise) if label == expert else 0.06 * (next(noise) - 0.4)
                effects.append(Effect(f"{kind} {expert}", label, base, base + harm, kind=kind))
    return effects


def make_tables() -> list[Table]:
    """Loss per domain of base, MoE and oracle."""
    rows = tuple(
        (name, 2.9 + 0.1 * number, 2.4 + 0.08 * number, 2.35 + 0.08 * number)
        for number, name in enumerate(NAMES)
    )
    return [
        Table(
            "Is the mixture better than its base?",
            ("text", "base model", "mixture of experts", "best single expert"),
            rows,
            note="Loss per token on each kind of text: lower is better. The best single expert is "
            "chosen by someone who knows the kind of text; the mixture has to find out.",
            headline="The mixture beats its base on 8 of 8 kinds of text.",
            best="lowest",
        )
    ]
