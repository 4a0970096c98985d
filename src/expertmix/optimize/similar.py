"""Near-duplicates: references that are the test sample itself, in other clothes.

A neighbor that repeats the test sample's text leaks its answer, so it is left out. Two signs, and
either is enough: embeddings that are nearly parallel (`neighbors` checks that), and texts that
share word n-grams; this file knows the second. Without texts on both sides, token ids stand for
words. Only prompts are compared: options are short, and often the same in many questions.

An n-gram that many references share is a template ("answer with the letter of …") and counts for
nobody.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from zlib import crc32

from expertmix.optimize.samples import Sample

_PROBED = 1000  # references whose n-grams are counted
_COMMON = 0.1  # share of them that makes an n-gram a template
_FEW = 5  # in fewer references than this it is none
_WORD = re.compile(r"\w+")

Gram = tuple[str | int, ...]


def grams(units: Sequence[str | int], size: int) -> frozenset[Gram]:
    """All runs of `size` units; a shorter text is one run of all it has."""
    if len(units) <= size:
        return frozenset([tuple(units)] if units else [])
    return frozenset(tuple(units[at : at + size]) for at in range(len(units) - size + 1))


def containment(mine: frozenset[Gram], other: frozenset[Gram]) -> float:
    """|A ∩ B| / min(|A|, |B|), from 0 to 1; 0 where one is empty.

    Containment and not Jaccard, so that a test text inside of a longer reference is found.
    """
    fewer = min(len(mine), len(other))
    return len(mine & other) / fewer if fewer else 0.0


@dataclass(frozen=True, eq=False)
class Duplicates:
    """Finds references that share a text with a test sample.

    Attributes:
        references: Theirs.
        size: Words of an n-gram.
        limit: Containment from which on a reference is a near-duplicate.
    """

    references: Sequence[Sample]
    size: int = 8
    limit: float = 0.5
    _kept: dict[tuple[int, bool], frozenset[Gram]] = field(default_factory=dict, repr=False)

    def overlap(self, sample: Sample, index: int) -> float:
        """Containment of the n-grams of a sample and of a reference, templates left out."""
        other = self.references[index]
        words = sample.text is not None and other.text is not None
        mine = grams(_units(sample, words), self.size) - self._templates(words)
        if (index, words) not in self._kept:
            theirs = grams(_units(other, words), self.size) - self._templates(words)
            self._kept[index, words] = theirs
        return containment(mine, self._kept[index, words])

    def found(self, sample: Sample, index: int) -> bool:
        """Whether a reference is a near-duplicate of a sample."""
        return self.overlap(sample, index) >= self.limit

    def all_of(self, sample: Sample) -> list[int]:
        """Numbers of all references that are near-duplicates of a sample."""
        near = {
            number
            for words in {False, sample.text is not None}
            for gram in grams(_units(sample, words), self.size)
            for number in self._holders.get(gram, ())
        }
        return sorted(number for number in near if self.found(sample, number))

    @cached_property
    def _holders(self) -> dict[Gram, list[int]]:
        """Which references hold an n-gram, of words or of tokens."""
        found: dict[Gram, list[int]] = defaultdict(list)
        for number, one in enumerate(self.references):
            kinds = [True, False] if one.text is not None else [False]
            for words in kinds:
                for gram in grams(_units(one, words), self.size) - self._templates(words):
                    found[gram].append(number)
        return found

    def _templates(self, words: bool) -> frozenset[Gram]:
        return self._word_templates if words else self._token_templates

    @cached_property
    def _word_templates(self) -> frozenset[Gram]:
        texts = (sample for sample in self.references if sample.text is not None)
        return _common((_units(sample, True) for sample in texts), self.size)

    @cached_property
    def _token_templates(self) -> frozenset[Gram]:
        return _common((_units(sample, False) for sample in self.references), self.size)


def _common(texts: Iterable[Sequence[str | int]], size: int) -> frozenset[Gram]:
    """N-grams of many texts; which texts are probed depends on them and not on their order."""
    probed = sorted(texts, key=lambda units: crc32(repr(units).encode()))[:_PROBED]
    count = Counter(gram for units in probed for gram in grams(units, size))
    least = max(_FEW, _COMMON * len(probed))
    return frozenset(gram for gram, times in count.items() if times >= least)


def _units(sample: Sample, words: bool) -> Sequence[str | int]:
    if words:
        return _WORD.findall((sample.text or "").lower())
    return sample.question.prompt
