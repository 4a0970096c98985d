"""Two worlds for tests of `optimize`: a tiny real MoE, and an analytic one without any model.

In the analytic world each question has a *topic* (its first prompt token), and each option of a
topic has a target in routing-weight space. An option's log-probability is

    log p(option) = −½ Σ_{d,l} ‖ω_{d,l} − target_{topic,option,l}‖²,   ω = mass · softmax(values)

over the top `width` experts, spread evenly over the option's tokens. So the best pathway for an
answer is its target, gradients are known in closed form, and samples of one topic share optima.

Legend: B questions, O options, W tokens of the longest option, D decision tokens, L sites,
E experts, H embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from expertmix.bindings.suffix import Suffix
from expertmix.bindings.transformers import TransformersMoE
from expertmix.core.pathway import Pathway, Question, Reading
from expertmix.core.site import Site, SiteInfo
from expertmix.optimize.samples import Sample
from expertmix.testing import VOCAB, tiny_moe

TOPICS = (5, 6, 7)


@cache
def model(family: str = "olmoe", copy: int = 0) -> nn.Module:
    """A tiny float32 MoE; shared, so never change its weights, nor open it twice at a time."""
    return tiny_moe(family)


@contextmanager
def open_suffix(
    family: str = "olmoe", *, layers: int = 2, decisions: int = 1, scored: bool = False,
    shift: bool = False, copy: int = 0,
) -> Iterator[Suffix]:  # fmt: skip
    """The tiny MoE's last layers, open."""
    moe = TransformersMoE(model(family, copy))
    suffix = Suffix(moe, moe.blocks[-layers:], decisions=decisions, scored=scored, shift=shift)
    with suffix.running():
        yield suffix


def samples(
    count: int,
    *,
    seed: int = 0,
    options: Sequence[int] = (2, 3, 4),
    longest: int = 12,
    gold: Sequence[int] | None = None,
) -> list[Sample]:
    """Random samples for either world, of several lengths; gold options are random."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, size: int) -> tuple[int, ...]:
        return tuple(torch.randint(low, high, (size,), generator=generator).tolist())

    def one(number: int) -> Sample:
        topic = TOPICS[number % len(TOPICS)]
        prompt = (topic, *draw(10, VOCAB, draw(2, longest, 1)[0]))
        count = options[number % len(options)]
        firsts = torch.randperm(30, generator=generator)[:count] + 20
        texts = tuple((int(first), *draw(10, VOCAB, draw(0, 3, 1)[0])) for first in firsts)
        right = draw(0, count, 1)[0] if gold is None else gold[number]
        return Sample(Question(prompt, texts), right, name=f"s{seed}-{number}")

    return [one(number) for number in range(count)]


def topical(count: int, *, seed: int = 0, topics: Sequence[int] = TOPICS) -> list[Sample]:
    """Samples for the analytic world: options 20 and 21, and 20 is right, in every topic."""
    generator = torch.Generator().manual_seed(seed)
    return [
        Sample(
            Question(
                (
                    topics[number % len(topics)],
                    *torch.randint(10, VOCAB, (4,), generator=generator).tolist(),
                ),
                ((20,), (21,)),
            ),
            0,
            name=f"t{seed}-{number}",
        )
        for number in range(count)
    ]


@dataclass(frozen=True, eq=False, slots=True)
class FakeBatch:
    """Targets of a batch: (B, O, L, E), base logits (B, D, L, E), options' tokens (B, O, W)."""

    target: Tensor
    base: Tensor
    tokens: Tensor
    broken: Tensor


class FakePathways:
    """`core.pathway.Pathways` without a model.

    Args:
        layers: L.
        experts: E.
        top_k: K of its router.
        decisions: D.
        dtype: Of all that it computes with.
        broken: First prompt tokens whose questions score NaN under any pathway, though they were
            read well.
        unreadable: First prompt tokens whose plain reading is NaN.
        pull: How near the base's pathway is to the target of option 20: 0 random, 1 there.
        seed: Another seed is another model, with another fingerprint.
    """

    exact = True
    scored = False
    shift = True
    notice: str | None = None

    def __init__(
        self,
        *,
        layers: int = 2,
        experts: int = 6,
        top_k: int = 2,
        decisions: int = 1,
        hidden: int = 8,
        dtype: torch.dtype = torch.float32,
        broken: Sequence[int] = (),
        unreadable: Sequence[int] = (),
        pull: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.layers, self.experts, self.top_k = layers, experts, top_k
        self.decisions, self.hidden, self.dtype = decisions, hidden, dtype
        self.broken, self.unreadable = frozenset(broken), frozenset(unreadable)
        self.pull, self.seed = pull, seed
        self.passes = 0  # how often it was read
        self.scorings = 0  # how often it was scored

    @property
    def sites(self) -> tuple[SiteInfo, ...]:
        """Named as in a real model."""
        return tuple(
            SiteInfo(Site(f"model.layers.{number}.mlp"), self.experts, self.top_k)
            for number in range(self.layers)
        )

    def fingerprint(self) -> str:
        """Of its seed and shape."""
        return f"fake-{self.seed}-{self.layers}-{self.experts}-{self.top_k}"

    def target(self, topic: int, option: int) -> Tensor:
        """(L, E) routing weights, summing to 1 per site, that are best for an option of a topic."""
        return self._noise(topic * 1000 + option, self.layers, self.experts).mul(2).softmax(-1)

    def base(self, prompt: Sequence[int]) -> Tensor:
        """(D, L, E) logits of the router."""
        number = sum((place + 1) * token for place, token in enumerate(prompt)) + 7
        noise = self._noise(number, self.decisions, self.layers, self.experts)
        return (1 - self.pull) * noise + self.pull * self.target(prompt[0], 20).log()

    def read(self, questions: Sequence[Question]) -> list[Reading]:
        """The base's hard scores; no state is needed to read again but an empty one."""
        self.passes += 1
        batch = self.batch(questions, [{} for _ in questions])
        self.scorings -= 1
        logprobs = self.score(batch, None)
        return [
            self._reading(one, logprobs[row, : len(one.options), : max(map(len, one.options))])
            for row, one in enumerate(questions)
        ]

    def _reading(self, one: Question, logprobs: Tensor) -> Reading:
        bad = float("nan") if one.prompt[0] in self.unreadable else 0.0
        base = self.base(one.prompt)
        best, indices = base.topk(self.top_k, -1)
        topic = self._noise(one.prompt[0], self.hidden) * 3
        last = topic + self._noise(sum(one.prompt), self.hidden)
        state = {"hidden": torch.full((len(one.prompt), self.hidden), bad)}
        return Reading(logprobs + bad, last + bad, (topic + last) / 2 + bad, base, indices,
                       best.softmax(-1), state)  # fmt: skip

    def batch(
        self,
        questions: Sequence[Question],
        states: Sequence[Mapping[str, Tensor]],
        *,
        only: Sequence[int] | None = None,
    ) -> FakeBatch:
        """Targets and base logits."""
        assert len(states) == len(questions)
        picked = [
            one.options if only is None else (one.options[only[row]],)
            for row, one in enumerate(questions)
        ]
        most = max(map(len, picked))
        W = max(len(text) for texts in picked for text in texts)
        target = torch.zeros(len(picked), most, self.layers, self.experts, dtype=self.dtype)
        tokens = torch.zeros(len(picked), most, W, dtype=self.dtype)
        for row, (one, texts) in enumerate(zip(questions, picked, strict=True)):
            for number, text in enumerate(texts):
                target[row, number] = self.target(one.prompt[0], text[0])
                tokens[row, number, : len(text)] = 1 / len(text)
        base = torch.stack([self.base(one.prompt) for one in questions])
        broken = torch.tensor([one.prompt[0] in self.broken for one in questions])
        return FakeBatch(target, base, tokens, broken)

    def score(self, batch: object, pathway: Pathway | None) -> Tensor:
        """The formula at the top of this file."""
        assert isinstance(batch, FakeBatch)
        self.scorings += 1
        values, width = batch.base, self.top_k
        mass = values.new_ones(values.shape[:-1])
        if pathway is not None:
            add = pathway.mode == "add"
            values = batch.base + pathway.values if add else pathway.values.to(self.dtype)
            mass, width = (mass if add else pathway.mass.to(self.dtype)), pathway.width
        values = values.expand(len(values), self.decisions, self.layers, self.experts)
        best, indices = values.topk(min(width, self.experts), -1)
        weights = torch.zeros_like(values).scatter(-1, indices, best.softmax(-1)) * mass[..., None]
        away = weights[:, None] - batch.target[:, :, None]
        scores = -0.5 * away.square().sum((-1, -2, -3))
        if pathway is not None:
            scores = scores.masked_fill(batch.broken[:, None], float("nan"))
        return (scores[..., None] * batch.tokens).where(batch.tokens > 0, 0)

    def _noise(self, number: int, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(number * 31 + self.seed)
        return torch.randn(*shape, generator=generator, dtype=self.dtype)
