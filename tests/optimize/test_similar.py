"""Near-duplicates by their texts."""

from __future__ import annotations

from dataclasses import replace

from expertmix.core.pathway import Question
from expertmix.optimize.samples import Sample
from expertmix.optimize.similar import Duplicates, containment, grams

WORDS = [f"w{number}" for number in range(40)]


def sample(words=None, tokens=(1, 2, 3)) -> Sample:
    """With a text, or with token ids only."""
    return Sample(
        Question(tuple(tokens), ((4,),)), 0, text=None if words is None else " ".join(words)
    )


def test_containment_is_symmetric_and_finds_a_part():
    """A text inside of another has containment 1, whichever is asked; strangers have 0."""
    part, whole = grams(WORDS[5:20], 8), grams(WORDS, 8)
    assert containment(part, whole) == containment(whole, part) == 1
    assert containment(part, grams([f"x{number}" for number in range(20)], 8)) == 0
    assert containment(frozenset(), whole) == 0


def test_a_copy_is_found_despite_case_and_punctuation():
    """Words are compared, not characters."""
    duplicates = Duplicates([sample(WORDS), sample(WORDS[::-1])])
    same = replace(sample(), text="; ".join(WORDS).upper() + "!")
    assert duplicates.found(same, 0)
    assert not duplicates.found(same, 1)


def test_half_a_copy_counts_from_the_limit_on():
    """A reference is a near-duplicate from a containment of `limit` on."""
    half = sample(WORDS[:20] + [f"x{number}" for number in range(20)])
    duplicates = Duplicates([sample(WORDS)])
    share = duplicates.overlap(half, 0)
    assert 0.3 < share < 0.5
    assert Duplicates([sample(WORDS)], limit=share).found(half, 0)
    assert not Duplicates([sample(WORDS)], limit=share + 0.01).found(half, 0)


def test_short_texts_are_compared_whole():
    """Texts of fewer words than an n-gram are near-duplicates where they are equal."""
    duplicates = Duplicates([sample(["yes"]), sample(["no"])])
    assert duplicates.found(sample(["Yes"]), 0)
    assert not duplicates.found(sample(["Yes"]), 1)


def test_token_ids_stand_for_words_where_a_text_is_missing():
    """Without texts on both sides, prompts are compared token by token."""
    duplicates = Duplicates([sample(WORDS, range(30)), sample(WORDS, range(100, 130))])
    test = sample(None, range(10, 40))
    assert duplicates.found(test, 0)
    assert not duplicates.found(test, 1)


def test_a_template_makes_no_duplicates():
    """What many references begin with is no sign that one repeats the test."""
    template = [f"t{number}" for number in range(30)]
    own = [sample([*template, *(f"q{number}a{word}" for word in range(9))]) for number in range(50)]
    test = sample([*template, *(f"other{word}" for word in range(9))])
    duplicates = Duplicates(own)
    assert not any(duplicates.found(test, number) for number in range(50))
    assert duplicates.found(own[7], 7)
    assert Duplicates(own[:3]).found(test, 0), "in few references nothing is a template"


def test_all_are_those_that_are_found_one_by_one():
    """Of references with and without text, for samples with and without."""
    known = [
        sample(WORDS[start : start + 12] if text else None, range(start, start + 12))
        for start in range(0, 28, 6)
        for text in (True, False)
    ]
    duplicates = Duplicates(known, size=4, limit=0.4)
    for test in (sample(WORDS[5:20], range(9, 24)), sample(None, range(9, 24)), sample([], [1])):
        wanted = [number for number in range(len(known)) if duplicates.found(test, number)]
        assert duplicates.all_of(test) == wanted
        assert bool(wanted) is (len(test.question.prompt) > 1)
