from __future__ import annotations

import math

import pytest

from expertmix.core.pathway import Question
from expertmix.optimize.samples import Sample
from expertmix.study.controls import vote, with_examples


def sample(prompt, options=((8,), (9,)), gold=0) -> Sample:
    return Sample(Question(tuple(prompt), tuple(options)), gold)


def test_a_vote_is_weighted():
    """The place with most weight wins, whatever the base says; shares are those of the weights."""
    found = vote([0.0, -5.0, -9.0], [sample([1], gold=1), sample([1], gold=0)], [0.75, 0.25])
    assert max(range(3), key=found.__getitem__) == 1
    assert math.exp(found[1]) == pytest.approx(0.99 * 0.75, abs=0.01)
    assert sum(map(math.exp, found)) == pytest.approx(1)


def test_a_tie_and_no_vote_leave_it_to_the_base():
    """Also where the neighbors' answers are at places that the item lacks."""
    base = [-5.0, -1.0]
    tied = vote(base, [sample([1], gold=0), sample([1], gold=1)], [0.5, 0.5])
    assert tied[1] > tied[0]
    assert vote(base, [], []) == base
    assert vote(base, [sample([1], ((8,), (9,), (7,)), gold=2)], [1.0]) == base
    assert vote(base, [sample([1])], [0.0]) == base


def test_examples_stand_before_the_question_nearest_last():
    """Question and right answer of each, a separator between; what begins a text stands once."""
    asked = sample([1, 50, 51])
    near, far = sample([1, 10, 11], gold=1), sample([1, 20], ((8,), (9, 9)), gold=1)
    longer, used = with_examples(asked, [near, far], separator=(0,), begin=(1,))
    assert used == 2
    assert longer.question.prompt == (1, 20, 9, 9, 0, 10, 11, 9, 0, 50, 51)
    assert longer.question.options == asked.question.options
    plain, _ = with_examples(sample([50]), [sample([10])], separator=(0,))
    assert plain.question.prompt == (10, 8, 0, 50)


def test_without_examples_nothing_changes():
    """Then in-context learning is the base."""
    asked = sample([1, 50, 51])
    assert with_examples(asked, [], separator=(0,), begin=(1,)) == (asked, 0)


def test_examples_that_do_not_fit_are_left_out():
    """The least similar first; the prompt and its longest option always fit."""
    asked = sample([50, 51], ((8,), (9, 9)))
    examples = [sample([10, 11]), sample([20, 21])]
    for context, expected in ((12, 2), (11, 1), (8, 1), (7, 0)):
        longer, used = with_examples(asked, examples, separator=(0,), context=context)
        assert used == expected
        assert len(longer.question.prompt) + 2 <= context
