from __future__ import annotations

from dataclasses import replace

import pytest

from expertmix.core.pathway import Question
from expertmix.errors import ConfigError
from expertmix.optimize.descent import NGD
from expertmix.optimize.oracle import Oracle, WrongOracle
from expertmix.optimize.probes import label_probes
from expertmix.optimize.surrogate import Surrogate

from .problems import only, problem_of
from .world import FakePathways, samples, topical


def loss(problem, values, targets):
    probes = label_probes(problem, targets)
    return Surrogate(problem, probes).losses(values)


def test_an_oracle_makes_the_right_option_likelier():
    """Its loss falls for every sample, to nearly 0 where a pathway can be right."""
    problem = problem_of(FakePathways(), samples(6), [])
    found = Oracle(NGD(steps=200, core=None)).solve(problem)
    gold = [one.gold for one in problem.samples]
    after = loss(problem, found.values, gold)
    assert (after < loss(problem, problem.start, gold)).all()
    assert (after < 1e-2).all()


def test_the_wrong_oracle_makes_a_wrong_option_likelier():
    """The noted target is wrong, and its loss falls for every sample."""
    problem = problem_of(FakePathways(), samples(6), [])
    found = WrongOracle(NGD(core=None)).solve(problem)
    targets = found.notes["target"].tolist()
    assert all(target != one.gold for target, one in zip(targets, problem.samples, strict=True))
    assert (loss(problem, found.values, targets) < loss(problem, problem.start, targets)).all()


def test_the_wrong_option_depends_on_the_sample_and_the_seed_only():
    """The same alone and in a batch; another seed draws others."""
    problem = problem_of(FakePathways(), samples(12, options=(4,)), [])
    drawn = WrongOracle().solve(problem).notes["target"].tolist()
    alone = [int(WrongOracle().solve(only(problem, row)).notes["target"]) for row in range(12)]
    assert drawn == alone
    assert drawn != WrongOracle(seed=1).solve(problem).notes["target"].tolist()


def test_the_same_option_is_pushed_in_every_order_of_an_item():
    """A cyclic shift of the options shifts the target with them."""
    for number, sample in enumerate(samples(9, options=(4,))):
        options, gold = sample.question.options, sample.gold
        pushed = set()
        for shift in range(4):
            prompt = (*sample.question.prompt, shift)  # letters: the prompt shows the order
            shown = Question(prompt, options[shift:] + options[:shift])
            asked = replace(sample, question=shown, gold=(gold - shift) % 4, item=f"q{number}")
            pushed.add(shown.options[WrongOracle().target(asked)])
        assert len(pushed) == 1
        assert options[gold] not in pushed


def test_one_option_only_has_no_wrong_one():
    """The base is kept, and the target is -1."""
    one = topical(1)[0]
    single = replace(one, question=Question(one.question.prompt, ((20,),)))
    found = WrongOracle().solve(problem_of(FakePathways(), [single], []))
    assert not found.changed.any()
    assert found.notes["target"].tolist() == [-1]
    assert found.reasons == ["no option to push"]


@pytest.mark.parametrize("method", [Oracle(), WrongOracle()])
def test_an_oracle_needs_labels(method):
    """It says so, and a sample without is an error that names it."""
    assert method.needs_labels
    unknown = replace(topical(1)[0], gold=None, name="who")
    with pytest.raises(ConfigError, match="who"):
        method.solve(problem_of(FakePathways(), [unknown], []))
