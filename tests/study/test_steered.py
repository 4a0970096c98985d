from __future__ import annotations

import pytest
import torch

import expertmix as em
from expertmix.errors import ConfigError
from expertmix.study.steered import generate

from .test_remix import ASKED, batch_of, model, reference  # noqa: F401  fixtures


def plain(lm, inputs, count: int) -> list[tuple[int, ...]]:
    """Greedy, row by row, up to an end."""
    found = []
    for row, real in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        ids, new = row[real.bool()][None], []
        for _ in range(count):
            token = int(lm(input_ids=ids).logits[0, -1].argmax())
            if token == lm.generation_config.eos_token_id:
                break
            new.append(token)
            ids = torch.cat([ids, torch.tensor([[token]])], 1)
        found.append(tuple(new))
    return found


@pytest.mark.parametrize("every", [None, 1, 3])
def test_without_a_change_it_is_plain_generation(model, reference, every):  # noqa: F811
    """No steps: greedy decoding, in rounds of any length."""
    inputs = batch_of(ASKED)
    made = generate(model, inputs, reference, "ngd steps=0", every=every, max_new_tokens=5)
    with torch.no_grad():
        assert list(made.ids) == plain(model, inputs, 5)


def test_the_override_is_at_the_last_prompt_token_only(model, reference):  # noqa: F811
    """The first new token is made under it; all later ones as the model routes by itself."""
    inputs = batch_of(ASKED)
    made = generate(model, inputs, reference, "kernel_regression alpha=0", max_new_tokens=4)
    ((rows, found),) = made.rounds
    assert rows == (0, 1, 2, 3)
    with torch.no_grad(), em.record(model, found.intervention()) as trace:
        model.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0)
    with torch.no_grad(), em.record(model, found.intervention()) as first:
        logits = model(**inputs).logits[:, -1]
    assert [ids[:1] for ids in made.ids] == [(int(row.argmax()),) for row in logits]
    assert len(trace.tokens) > len(first.tokens)
    assert any(outcome.changed for outcome in found.outcomes)


def test_it_is_remixed_again_every_so_many_tokens(model, reference):  # noqa: F811
    """Each round reads the text so far; a prompt that has ended is in no later round."""
    inputs = batch_of(ASKED)
    made = generate(
        model, inputs, reference, "kernel_regression alpha=0", every=2, max_new_tokens=5
    )
    assert made.rounds[0][0] == (0, 1, 2, 3)
    assert len(made.rounds) == 3
    for number, (rows, found) in enumerate(made.rounds):
        for row, outcome in zip(rows, found.outcomes, strict=True):
            before = made.ids[row][: 2 * number]
            assert outcome.sample.question.prompt == (*ASKED[row].question.prompt, *before)
    assert all(len(ids) <= 5 for ids in made.ids)


def test_nothing_outlives_a_round(model, reference):  # noqa: F811
    """The model generates afterwards as before."""
    inputs = batch_of(ASKED)
    with torch.no_grad():
        before = model(**inputs).logits
        generate(model, inputs, reference, "ngd steps=1", max_new_tokens=2)
        assert torch.equal(model(**inputs).logits, before)


@pytest.mark.parametrize("wrong", [{"every": 0}, {"max_new_tokens": 0}])
def test_numbers_below_one_are_refused(model, reference, wrong):  # noqa: F811
    """Before anything runs."""
    with pytest.raises(ConfigError, match="must be at least 1"):
        generate(model, batch_of(ASKED), reference, **wrong)
