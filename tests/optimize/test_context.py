from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from expertmix.core.pathway import Pathway, Question
from expertmix.errors import ConfigError
from expertmix.optimize.context import ContextLoss
from expertmix.optimize.descent import NGD
from expertmix.optimize.samples import Sample

from .problems import only, problem_of
from .world import model, open_suffix, samples


def test_one_question_says_all_where_options_are_decision_tokens():
    """All but the first token, or from the split on."""
    assert ContextLoss().questions((1, 2, 3, 4), scored=True) == [Question((1,), ((2, 3, 4),))]
    assert ContextLoss(split=3).questions((1, 2, 3, 4), scored=True) == [
        Question((1, 2, 3), ((4,),))
    ]


def test_cuts_are_spread_over_the_prompt_where_one_token_decides():
    """Each counts what follows it, up to the horizon."""
    found = ContextLoss(cuts=3, horizon=2).questions(tuple(range(10)), scored=False)
    assert [len(one.prompt) for one in found] == [1, 4, 7]
    assert [one.options for one in found] == [((1, 2),), ((4, 5),), ((7, 8),)]


def test_a_prompt_that_is_too_short_is_not_asked():
    """One token cannot be split; two can, once."""
    assert ContextLoss().questions((1,), scored=False) == []
    assert len(ContextLoss(cuts=4).questions((1, 2), scored=False)) == 1


def test_the_loss_at_the_start_is_the_prompts_own_next_token_loss():
    """−mean log p(x_{t+1} | x_{≤t}) of the model itself, to 1e-5."""
    tests = samples(3)
    method = ContextLoss(NGD(steps=0, core=None, hard=True))
    with open_suffix(shift=True, scored=True) as suffix:
        found = method.solve(problem_of(suffix, tests, []))
    for row, one in enumerate(tests):
        ids = torch.tensor([one.question.prompt])
        with torch.no_grad():
            logprobs = model()(ids).logits[0, :-1].float().log_softmax(-1)
        want = -logprobs.gather(1, ids[0, 1:, None]).mean()
        torch.testing.assert_close(found.losses[0, row], want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("scored", [True, False])
def test_the_prompt_becomes_likelier_without_labels_or_neighbors(scored):
    """For every sample, alone as in a batch; samples without a gold option are fine."""
    tests = [replace(one, gold=None) for one in samples(3)]
    with open_suffix(shift=True, scored=scored) as suffix:
        problem = problem_of(suffix, tests, [], [[], [], []])
        found = ContextLoss().solve(problem)
        assert found.mode == "add"
        assert found.changed.all()
        assert (found.losses[-1] < found.losses[0]).all()
        alone = ContextLoss().solve(only(problem, 1))
        torch.testing.assert_close(alone.losses[:, 0], found.losses[:, 1], atol=1e-5, rtol=0)
        batch = suffix.batch(
            [one.question for one in tests], [one.state for one in problem.readings]
        )
        with torch.no_grad():
            scores = suffix.score(batch, Pathway(found.values, problem.mass, 3, "add"))
        assert scores.isfinite().all()


def test_a_prompt_of_one_token_keeps_the_base():
    """Nothing is changed."""
    tests = [Sample(Question((5,), ((6,), (7,))))]
    with open_suffix(shift=True) as suffix:
        found = ContextLoss().solve(problem_of(suffix, tests, [], [[]]))
        assert not found.changed.any()
        assert (found.values == 0).all()


@pytest.mark.parametrize("settings", [{"split": 0}, {"cuts": 0}, {"horizon": 0},
                                      {"descent": NGD(objective="choice")}])  # fmt: skip
def test_an_impossible_setting_is_an_error(settings):
    """ConfigError."""
    with pytest.raises(ConfigError):
        ContextLoss(**settings)
