"""Questions as rows: what a token may see, who decides and who predicts."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from expertmix.bindings.tree import PROMPT, plant
from expertmix.core.pathway import Question

texts = st.lists(st.integers(1, 50), min_size=1, max_size=6).map(tuple)
asked = st.lists(
    st.builds(Question, texts, st.lists(texts, min_size=1, max_size=3).map(tuple)),
    min_size=1,
    max_size=3,
)


def _text(tree, row, column):
    """What a column may see, in the order of its text."""
    seen = tree.visible()[row, column].nonzero().flatten()
    order = tree.position[row, seen].argsort()
    return tree.ids[row, seen[order]].tolist()


@given(asked, st.integers(1, 4))
def test_a_token_sees_its_own_text(questions, decisions):
    """Before every predicted token stands the prompt, then its option up to there, and no more."""
    tree = plant(questions, decisions)
    for row, one in enumerate(questions):
        for number, option in enumerate(one.options):
            for place, target in enumerate(option):
                assert tree.predicted[row, number, place]
                assert tree.target[row, number, place] == target
                column = tree.context + int(tree.source[row, number, place])
                assert _text(tree, row, column) == list(one.prompt + option[:place])
    assert int(tree.predicted.sum()) == sum(len(o) for one in questions for o in one.options)


@given(asked, st.integers(1, 4), st.integers(1, 5))
def test_a_window_is_by_position(questions, decisions, window):
    """A window of n leaves the n latest tokens of a text, padding between them or not."""
    tree = plant(questions, decisions)
    whole, near = tree.visible(), tree.visible(window)
    distance = tree.position[:, :, None] - tree.position[:, None, :]
    eye = torch.eye(whole.shape[1], dtype=torch.bool)
    assert torch.equal(near, whole & (distance < window) | eye)


@given(asked, st.integers(1, 4), st.booleans())
def test_decision_tokens_end_the_prompt(questions, decisions, scored):
    """The last D tokens of a prompt decide, and with `scored` what options read; counted back."""
    tree = plant(questions, decisions)
    slots = tree.slots(decisions, scored)
    expected = []
    for row, one in enumerate(questions):
        count = min(decisions, len(one.prompt))
        expected += [(row, back) for back in reversed(range(count))]
        expected += [(row, 0)] * (sum(len(o) - 1 for o in one.options) if scored else 0)
    assert list(zip(slots.question.tolist(), slots.back.tolist(), strict=True)) == expected
    group = tree.group[:, tree.context :].flatten()[slots.rows]
    assert scored or bool((group == PROMPT).all())
