"""A search for misleading tokens works within its budget, and what is far is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from expertmix.errors import ConfigError
from expertmix.optimize.attack import Append, append, damage
from expertmix.optimize.descent import NGD
from expertmix.optimize.gate import Gate
from expertmix.optimize.neighbors import Neighbors
from expertmix.optimize.reference import ReferenceSet
from expertmix.optimize.remix import remix
from expertmix.optimize.samples import Sample

from .world import FakePathways, open_suffix, samples, topical

NEAR = Neighbors(k=3, ngram=None, max_similarity=None)
DESCENT = NGD(steps=15, lr=0.5, core=None)


def test_appended_tokens_approach_the_target() -> None:
    """A search ends nearer to its target than its start, within its budget, in a real model."""
    with open_suffix() as pathways:
        reference = ReferenceSet.build(pathways, _right(pathways, samples(12, seed=3)))
        asked = samples(3, seed=4)
        target = reference.embeddings[:2].mean(0)
        attack = Append(length=4, budget=40, tries=8, words=90)
        found = append(pathways, asked, reference, target, attack)
        again = append(pathways, asked[1:2], reference, target, attack)
    for one, sample in zip(found, asked, strict=True):
        assert one.after > one.before
        assert one.reads <= 40
        assert len(one.tokens) == 4
        assert one.sample.question.prompt == sample.question.prompt + one.tokens
        assert one.sample.question.options == sample.question.options
    assert again[0].tokens == found[1].tokens


def test_phrases_come_first() -> None:
    """A search that may read no more than its phrases ends with the best of them."""
    with open_suffix() as pathways:
        reference = ReferenceSet.build(pathways, _right(pathways, samples(8, seed=3)))
        asked = samples(1, seed=4)
        phrases = ((11, 12, 13), (14, 15), (16, 17, 18))
        attack = Append(length=2, budget=3, phrases=phrases)
        found = append(pathways, asked, reference, reference.embeddings[0], attack)[0]
    assert found.tokens in {one[-2:] for one in phrases}
    assert found.reads == 3


def test_a_cue_stays_behind_the_inserted_tokens() -> None:
    """What the attacker does not write stays where it is."""
    with open_suffix() as pathways:
        reference = ReferenceSet.build(pathways, _right(pathways, samples(4, seed=3)))
        asked = samples(1, seed=4)
        attack = Append(length=2, budget=5, behind=1, words=90)
        found = append(pathways, asked, reference, reference.embeddings[0], attack)[0]
        assert found.reads <= 5
        prompt = asked[0].question.prompt
        assert found.sample.question.prompt == (*prompt[:-1], *found.tokens, prompt[-1])
        with pytest.raises(ConfigError, match="behind"):
            append(pathways, asked, reference, reference.embeddings[0], replace(attack, behind=50))


def test_a_far_suffix_is_refused() -> None:
    """A prompt that was led away from all references keeps the base's routing."""
    with open_suffix() as pathways:
        reference = ReferenceSet.build(pathways, _right(pathways, samples(16, seed=3)))
        asked = samples(1, seed=4)
        away = reference.embeddings.mean(0) - 5 * (
            reference.embeddings[0] - reference.embeddings.mean(0)
        )
        found = append(pathways, asked, reference, away, Append(length=6, budget=60, words=90))
        led = [one.sample for one in found]
        gate = Gate(max_distance=0.05)
        kept = remix(pathways, led, reference, NGD(steps=1, core=None), gate=gate, neighbors=NEAR)
    assert all(not one.changed and "too far" in one.reason for one in kept.outcomes)
    assert damage(kept, kept, []).refused == len(led)


@pytest.mark.parametrize("key", ["length", "budget", "tries", "words"])
def test_an_impossible_search_is_refused(key: str) -> None:
    """With what and where."""
    with pytest.raises(ConfigError, match=key):
        replace(Append(), **{key: 0})  # type: ignore[arg-type]


def test_runs_of_other_samples_are_not_compared() -> None:
    """Damage is per sample."""
    pathways, asked = FakePathways(), topical(3)
    reference = ReferenceSet.build(FakePathways(pull=0.9), topical(6, seed=1))
    clean = remix(pathways, asked, reference, NGD(steps=0), neighbors=NEAR)
    with pytest.raises(ConfigError, match="outcomes"):
        damage(clean, replace(clean, outcomes=clean.outcomes[1:]), [])


def _right(pathways: object, asked: list[Sample]) -> list[Sample]:
    """With what the model answers as the right option."""
    readings = pathways.read([one.question for one in asked])  # type: ignore[attr-defined]
    return [
        replace(
            one, gold=int(reading.logprobs.sum(-1).argmax()) if len(one.question.options) > 1 else 0
        )
        for one, reading in zip(asked, readings, strict=True)
    ]
