"""Attacks on the similarity search: a test of how far re-mixing can be misled, and by what.

Whoever writes a part of a prompt can look for tokens that bring its embedding to other references
(`append`); whoever can write into a reference set can put crafted references where a victim will
find them (`poison.py`); both together bring any prompt to the crafted ones. What such an attack
does is told against the same run without it (`damage`). Defenses are elsewhere: `aggregate`,
`gate`, `neighbors` (near-duplicates), `trust`, fingerprints, and `poison.audit`.

Knows the public pieces of `optimize`; no model and no task.

Legend: B samples, H embedding width.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from expertmix.core.pathway import Pathways, Question
from expertmix.errors import ConfigError
from expertmix.optimize.reference import ReferenceSet
from expertmix.optimize.remix import Remix
from expertmix.optimize.samples import Sample


@dataclass(frozen=True, slots=True)
class Append:
    """A search for tokens that bring a prompt's embedding to a target.

    Greedy and random: tokens start at random, or as the best of some phrases; then one of them
    after another is replaced by the best of some drawn ones, if that is better.

    Attributes:
        length: Tokens that are inserted.
        budget: Prompts that may be read per sample, at most.
        tries: Tokens that are tried at one place at a time.
        behind: Tokens of the prompt's end that stay behind the inserted ones, such as a cue that
            the attacker does not write.
        words: Token ids below this are drawn.
        phrases: Runs of tokens, such as prompts of the target's cluster: their ends are tried
            first, and only their tokens are drawn then.
        seed: Of the draws; with the prompt it decides them, whatever else is in the batch.
    """

    length: int = 8
    budget: int = 256
    tries: int = 32
    behind: int = 0
    words: int = 1000
    phrases: tuple[tuple[int, ...], ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"length": 1, "budget": 1, "tries": 1, "behind": 0, "words": 1}
        for key, bound in least.items():
            if getattr(self, key) < bound:
                raise ConfigError(f"{key}={getattr(self, key)}: it must be at least {bound}")


@dataclass(frozen=True, slots=True)
class Appended:
    """What a search found.

    Attributes:
        sample: With the inserted tokens, and without a text: it would be another one.
        tokens: The inserted ones.
        before: Centered cosine of the untouched prompt to the target.
        after: Of the new prompt.
        reads: Prompts that were read, all within the budget.
    """

    sample: Sample
    tokens: tuple[int, ...]
    before: float
    after: float
    reads: int


def append(
    pathways: Pathways,
    samples: Sequence[Sample],
    reference: ReferenceSet,
    targets_BH: Tensor,
    attack: Append,
) -> list[Appended]:
    """Bring each sample's embedding to a target; samples do not influence each other.

    Args:
        pathways: The model, open.
        samples: B prompts.
        reference: Whose embedding and mean similarity is measured with.
        targets_BH: (B, H) or (H,) embeddings to go to, such as the mean of a cluster.
        attack: How it is searched.

    Raises:
        ConfigError: References whose embeddings are not made from readings.
    """
    targets_BH = targets_BH.expand(len(samples), -1)
    return [
        _Search(pathways, reference, sample, target_H, attack).run()
        for sample, target_H in zip(samples, targets_BH, strict=True)
    ]


class _Search:
    """One sample's search."""

    def __init__(
        self,
        pathways: Pathways,
        reference: ReferenceSet,
        sample: Sample,
        target_H: Tensor,
        attack: Append,
    ) -> None:
        if attack.behind >= len(sample.question.prompt):
            raise ConfigError(
                f"behind={attack.behind}: sample {sample.name!r} has a prompt of "
                f"{len(sample.question.prompt)} tokens, and one at least must stay in front"
            )
        self.pathways, self.reference = pathways, reference
        self.sample, self.attack = sample, attack
        self.center_H = reference.embeddings.mean(0)
        self.target_H = functional.normalize(target_H - self.center_H, dim=0)
        self.draws = torch.Generator().manual_seed(attack.seed * 1_000_003 + _sum(sample))
        self.pool: Sequence[int] = sorted({token for one in attack.phrases for token in one})
        self.pool = self.pool or range(attack.words)
        self.reads = 0

    def run(self) -> Appended:
        before = float(self._similarity([()], counted=False)[0])
        starts = [one[-self.attack.length :] for one in self.attack.phrases if one]
        starts = starts[: self.attack.budget] or [tuple(self._drawn(self.attack.length))]
        similarity = self._similarity(starts)
        tokens, after, place = starts[int(similarity.argmax())], float(similarity.max()), 0
        while (room := self.attack.budget - self.reads) > 0:
            drawn = self._drawn(min(self.attack.tries, room))
            tried = [(*tokens[:place], token, *tokens[place + 1 :]) for token in drawn]
            found = self._similarity(tried)
            best = int(found.argmax())
            if float(found[best]) > after:
                tokens, after = tried[best], float(found[best])
            place = (place + 1) % len(tokens)
        return Appended(self._with(tokens), tokens, before, after, self.reads)

    def _drawn(self, count: int) -> list[int]:
        pool = self.pool
        drawn = torch.randint(len(pool), (count,), generator=self.draws)
        return [pool[number] for number in drawn.tolist()]

    def _similarity(self, tried: Sequence[tuple[int, ...]], *, counted: bool = True) -> Tensor:
        """Centered cosines to the target; only prompts are read, with one token behind them."""
        self.reads += len(tried) * counted
        samples = [self._with(tokens) for tokens in tried]
        readings = self.pathways.read([Question(one.question.prompt, ((0,),)) for one in samples])
        found_BH = self.reference.embed(readings, samples) - self.center_H
        cosines: Tensor = functional.normalize(found_BH, dim=1) @ self.target_H
        return cosines

    def _with(self, tokens: tuple[int, ...]) -> Sample:
        prompt = self.sample.question.prompt
        cut = len(prompt) - self.attack.behind
        question = replace(self.sample.question, prompt=prompt[:cut] + tokens + prompt[cut:])
        return replace(self.sample, question=question, text=None)


@dataclass(frozen=True, slots=True)
class Damage:
    """What an attack did to B samples.

    Attributes:
        samples: B.
        hostile: Share of the neighbors that are the attacker's, by kernel weight, over samples
            that were not refused.
        refused: Samples that kept the base's routing.
        base_right: Samples that the base answers right, on what it was asked under attack.
        right: Of the re-mixed answers under attack.
        clean_right: Of the re-mixed answers without it.
        flipped: Samples that are right re-mixed without the attack, and wrong with it.
        hijacked: Samples that the base answers right on the very same prompt and re-mixing wrong:
            what re-mixing itself lost.
    """

    samples: int
    hostile: float
    refused: int
    base_right: int
    right: int
    clean_right: int
    flipped: int
    hijacked: int


def damage(clean: Remix, attacked: Remix, hostile: Collection[int]) -> Damage:
    """Compare a run under attack with the same samples without it.

    Args:
        clean: Without the attack.
        attacked: With it; samples in the same order, with their right options.
        hostile: Numbers of the references that are the attacker's, or that he wants to be found.

    Raises:
        ConfigError: Other samples.
    """
    if len(clean) != len(attacked):
        raise ConfigError(f"{len(clean)} outcomes without the attack, {len(attacked)} with it")
    bad = torch.tensor(sorted(hostile), dtype=torch.int64)
    taken = [
        float(one.neighbors.weights[torch.isin(one.neighbors.indices, bad)].sum())
        for one in attacked.outcomes
        if one.changed and one.neighbors is not None
    ]
    before = [bool(one.correct["hard"]) for one in clean.outcomes]
    after = [bool(one.correct["hard"]) for one in attacked.outcomes]
    base = [bool(one.correct["base"]) for one in attacked.outcomes]
    return Damage(
        len(after),
        sum(taken) / len(taken) if taken else 0.0,
        sum(not one.changed for one in attacked.outcomes),
        sum(base),
        sum(after),
        sum(before),
        sum(b and not a for b, a in zip(before, after, strict=True)),
        sum(b and not a for b, a in zip(base, after, strict=True)),
    )


def _sum(sample: Sample) -> int:
    """A number that a prompt decides."""
    return sum((place + 1) * token for place, token in enumerate(sample.question.prompt)) % (
        1 << 20
    )
