"""Crafted references: put among true ones by an attacker (`poison`), and found again (`audit`).

Knows the public pieces of `optimize`; no model and no task.

Legend: V victims, M crafted references, N true ones, H embedding width, O options, W tokens.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from expertmix.core.pathway import Pathways
from expertmix.errors import ConfigError
from expertmix.optimize.reference import ReferenceSet
from expertmix.optimize.samples import Sample, scores

Aim = Literal["label", "pathway", "both"]
_NEAR = 1e-3  # what reading a reference again may differ by, relative


@dataclass(frozen=True, slots=True)
class Poison:
    """Crafted references in the neighborhood of victims.

    Each is a copy of a true reference near its victim, so its question looks right; its embedding
    says that it is still nearer.

    Attributes:
        count: Crafted references per victim.
        aim: `label`: the option that the model finds least likely counts as right. `pathway`: the
            experts that the base likes least come first. `both`.
        similarity: Centered cosine to the victim; just below what counts as a near-duplicate.
        seed: Of the directions in which they lie around their victims.
    """

    count: int = 3
    aim: Aim = "both"
    similarity: float = 0.94
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ConfigError(f"count={self.count}: it must be at least 0")
        if self.aim not in get_args(Aim):
            raise ConfigError(f"aim={self.aim!r} is none of {', '.join(get_args(Aim))}")
        if not -1 <= self.similarity <= 1:
            raise ConfigError(f"similarity={self.similarity}: it is a cosine, from -1 to 1")


@dataclass(frozen=True, eq=False, slots=True)
class Poisoned:
    """A reference set with crafted references.

    Attributes:
        reference: The set; the true ones keep their numbers.
        hostile: Numbers of the crafted ones.
    """

    reference: ReferenceSet
    hostile: frozenset[int]


def poison(reference: ReferenceSet, victims_VH: Tensor, attack: Poison) -> Poisoned:
    """Add crafted references for victims.

    Args:
        reference: True references, with states or bound to a model.
        victims_VH: (V, H) embeddings of the victims.
        attack: What is crafted.
    """
    total = len(reference)
    victims_MH = victims_VH.repeat_interleave(attack.count, 0)
    if not len(victims_MH):
        return Poisoned(reference, frozenset())
    center_H = reference.embeddings.mean(0)
    nearness_MN = (
        functional.normalize(victims_MH - center_H, dim=1)
        @ functional.normalize(reference.embeddings - center_H, dim=1).mT
    )
    ranks = torch.arange(len(victims_MH)) % attack.count
    best_MN = nearness_MN.argsort(dim=1, descending=True)
    donors = best_MN[torch.arange(len(ranks)), ranks % total].tolist()
    joined = reference.subset([*range(total), *donors])
    crafted_MH = _around(victims_MH - center_H, attack) + center_H
    embeddings = torch.cat([reference.embeddings, crafted_MH])
    samples, start = list(joined.samples), joined.start.clone()
    for number in range(total, total + len(donors)):
        if attack.aim != "pathway":
            samples[number] = _mislabeled(samples[number], joined.logprobs[number])
        if attack.aim != "label":
            start[number] = -start[number]
    found = replace(joined, samples=samples, embeddings=embeddings, start=start)
    return Poisoned(found, frozenset(range(total, len(found))))


def _around(away_MH: Tensor, attack: Poison) -> Tensor:
    """(M, H) vectors of the same lengths, at the given cosine to each, in random directions."""
    generator = torch.Generator().manual_seed(attack.seed)
    unit_MH = functional.normalize(away_MH, dim=1)
    drawn_MH = torch.randn(away_MH.shape, generator=generator)
    aside_MH = drawn_MH - (drawn_MH * unit_MH).sum(1, keepdim=True) * unit_MH
    near = torch.tensor(attack.similarity)
    mixed_MH = near * unit_MH + (1 - near.square()).sqrt() * functional.normalize(aside_MH, dim=1)
    found_MH: Tensor = mixed_MH * away_MH.norm(dim=1, keepdim=True)
    return found_MH


def _mislabeled(sample: Sample, logprobs_OW: Tensor) -> Sample:
    """With the least likely of the wrong options as the right one."""
    found_O = scores(logprobs_OW[None], [sample])[0]
    if sample.gold is not None and len(found_O) > 1:
        found_O[sample.gold] = torch.inf
    return replace(sample, gold=int(found_O.argmin()))


def audit(
    pathways: Pathways, reference: ReferenceSet, numbers: Collection[int] | None = None
) -> list[int]:
    """Numbers of references that are not what the model makes of them: a defense.

    They are read again. A reference is what it says if the model answers it as it is labeled, and
    its embedding (where it is made from readings) is the one that is stored.

    Args:
        pathways: The model, open.
        reference: The set.
        numbers: Which to look at, such as the neighbors of a batch; all by default.
    """
    looked = sorted(range(len(reference)) if numbers is None else set(numbers))
    found: list[int] = []
    for at in range(0, len(looked), 16):
        part = looked[at : at + 16]
        samples = [reference.samples[number] for number in part]
        readings = pathways.read([sample.question for sample in samples])
        stored_BH = reference.embeddings[part]
        again_BH = stored_BH
        if reference.embedding in ("mean", "last"):
            again_BH = reference.embed(readings, samples)
        away_B = (again_BH - stored_BH).norm(dim=1) > _NEAR * stored_BH.norm(dim=1)
        for number, sample, reading, away in zip(part, samples, readings, away_B, strict=True):
            answer = int(scores(reading.logprobs[None], [sample])[0].argmax())
            if bool(away) or answer != sample.gold:
                found.append(number)
    return found
