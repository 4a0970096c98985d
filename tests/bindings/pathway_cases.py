"""Brute force for pathways: one plain pass per option, edited by `em.record` and `Reweight`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import expertmix as em
from expertmix.bindings.suffix import Suffix
from expertmix.bindings.transformers import TransformersMoE
from expertmix.bindings.whole import Whole
from expertmix.core.pathway import Pathway, Question
from expertmix.core.site import SiteInfo

FAMILIES = (
    "olmoe", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss",
)  # fmt: skip
EXACT = 1e-5


def _ids(generator: torch.Generator, count: int) -> tuple[int, ...]:
    return tuple(torch.randint(3, 90, (count,), generator=generator).tolist())


def questions() -> list[Question]:
    """Short and long prompts (longer than a tiny model's window), down to one token."""
    generator = torch.Generator().manual_seed(5)
    lengths = [(7, (1, 3, 2)), (20, (4, 2)), (1, (1, 1, 5))]
    return [
        Question(_ids(generator, prompt), tuple(_ids(generator, one) for one in options))
        for prompt, options in lengths
    ]


def pathway(
    sites: Sequence[SiteInfo],
    width: int,
    *,
    depth: int = 1,
    mode="set",
    rows: int = 3,
    seed: int = 0,
) -> Pathway:
    """A random one, with gradients."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, depth, len(sites))
    values = torch.randn(*shape, sites[0].num_experts, generator=generator) * 2
    mass = torch.rand(shape, generator=generator) + 0.5
    return Pathway(values.requires_grad_(), mass, width, mode)


def suffix_of(model, last: int = 2, **settings) -> Suffix:
    moe = TransformersMoE(model)
    return Suffix(moe, moe.blocks[-last:], **settings)


def whole_of(model, last: int = 2, **settings) -> Whole:
    moe = TransformersMoE(model)
    return Whole(moe, moe.sites[-last:], **settings)


def read_and_batch(pathways, asked, **settings):
    readings = pathways.read(asked)
    return pathways.batch(asked, [reading.state for reading in readings], **settings)


def plain(model, asked: Sequence[Question], edits_of=lambda row, option: ()) -> list[list[Tensor]]:
    """Log-probabilities of every option's tokens, each from a pass of its own."""
    found = []
    for row, one in enumerate(asked):
        found.append([])
        for option in one.options:
            ids = torch.tensor([one.prompt + option[:-1]])
            with torch.no_grad(), em.record(model, *edits_of(row, option)):
                logprobs = model(ids).logits.float().log_softmax(-1)[0, len(one.prompt) - 1 :]
            found[-1].append(logprobs.gather(1, torch.tensor(option)[:, None])[:, 0])
    return found


def edits(
    asked: Sequence[Question], sites: Sequence[SiteInfo], way: Pathway, decisions: int, scored: bool
):
    """What a pathway means, as interventions of one row's pass."""

    def edits_of(row: int, option: Sequence[int]):
        length, depth = len(asked[row].prompt), way.values.shape[1]
        places = [(length - 1 - back, back) for back in range(min(decisions, length))]
        places += [(length + more, 0) for more in range(len(option) - 1)] if scored else []
        for place, back in places:
            for number, info in enumerate(sites):
                slot = max(0, depth - 1 - back)
                values = way.values.detach()[row, slot, number]
                if way.mode == "set":
                    best = values.topk(way.width)
                    weights = torch.zeros_like(values)
                    weights[best.indices] = way.mass[row, slot, number] * best.values.softmax(0)
                    yield em.Reweight(str(info.site), weights, stage="weights", positions=[place])
                else:
                    yield em.Reweight(
                        str(info.site), values, stage="logits", mode="add", positions=[place]
                    )

    return lambda row, option: tuple(edits_of(row, option))


def worst(scores, wanted: Sequence[Sequence[Tensor]]) -> float:
    """Largest difference between (B, O, W) scores and one tensor per option."""
    return max(
        float((scores[row][number][: len(one)] - one).abs().max())
        for row, options in enumerate(wanted)
        for number, one in enumerate(options)
    )


def hooks(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
