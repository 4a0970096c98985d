"""Samples in, better routing for each of them out."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import pytest
import torch

import expertmix as em
from expertmix.core.pathway import Pathway, Question
from expertmix.errors import ConfigError, FingerprintError
from expertmix.optimize.descent import NGD
from expertmix.optimize.gate import Gate
from expertmix.optimize.neighbors import Neighbors
from expertmix.optimize.oracle import Oracle
from expertmix.optimize.problem import Solution
from expertmix.optimize.reference import ReferenceSet
from expertmix.optimize.remix import Remix, outcomes, remix
from expertmix.optimize.samples import Sample, scores

from .world import FakePathways, model, open_suffix, samples, topical


@dataclass(frozen=True)
class Turned:
    """A double of a method: moves logits by a wave that each sample's prompt decides."""

    mode: str = "set"
    scale: float = 2.0
    name: str = "turned"

    def solve(self, problem, progress=None):
        """The wave; samples without neighbors are left alone."""
        base = problem.start if self.mode == "set" else torch.zeros_like(problem.start[:, :1])
        phase = torch.tensor([float(sum(one.question.prompt)) for one in problem.samples])
        wave = torch.arange(base[0].numel()).float().view(base[0].shape)
        moved = base + self.scale * (wave + phase.view(-1, 1, 1, 1)).sin()
        changed = problem.neighbors.present.any(1)
        return Solution(moved, self.mode, changed, notes={"phase": phase})


@pytest.fixture(scope="module")
def world():
    """The tiny MoE, open, with references; and test samples of other texts."""
    with open_suffix() as pathways:
        yield pathways, ReferenceSet.build(pathways, samples(40)), samples(9, seed=7)


@pytest.fixture
def fake():
    """The analytic world."""
    pathways = FakePathways(pull=0.6)
    return pathways, ReferenceSet.build(pathways, topical(30)), topical(8, seed=3)


def same(one, other) -> bool:
    """Bit for bit."""
    return torch.equal(one, other)


@pytest.mark.parametrize(
    ("method", "neighbors", "reason"),
    [
        (Turned(), Neighbors(0), "no neighbors"),
        (NGD(), Neighbors(0), "no neighbors"),
        (NGD(), Neighbors(max_similarity=-1.0), "no neighbors"),
        (NGD(steps=0), Neighbors(), "the method left it alone"),
    ],
)
def test_nothing_to_go_by_is_the_base_bit_for_bit(world, method, neighbors, reason):
    """k = 0, all neighbors filtered out, or zero steps: the plain pass's own scores."""
    pathways, reference, tests = world
    found = remix(pathways, tests, reference, method, neighbors=neighbors, batch_size=len(tests))
    readings = pathways.read([tests[one].question for one in by_length(tests)])
    for reading, number in zip(readings, by_length(tests), strict=True):
        outcome = found.outcomes[number]
        base = scores(reading.logprobs[None], [tests[number]])[0]
        assert same(outcome.base, base)
        assert same(outcome.hard, base)
        assert same(outcome.dense, base)
        assert not outcome.changed
        assert outcome.values is None
        assert outcome.reason == reason
    assert found.intervention().parts() == ()


def by_length(tests):
    """The order in which batches are made."""
    return sorted(
        range(len(tests)),
        key=lambda one: (
            len(tests[one].question.prompt), sum(map(len, tests[one].question.options)),
        ),
    )  # fmt: skip


def test_unchanged_samples_are_given_no_pathway(fake):
    """Where nothing changed, nothing is scored again."""
    pathways, reference, tests = fake
    pathways.scorings = 0
    remix(pathways, tests, reference, Turned(), neighbors=Neighbors(0))
    assert pathways.scorings == 0


@pytest.mark.parametrize("method", [Turned(), NGD(optimizer="gd", lr=1.0), NGD(steps=4)])
def test_a_sample_is_the_same_alone_and_in_a_batch(world, method):
    """In any batch and any order, to 1e-4 in its scores; the same neighbors, bit for bit."""
    pathways, reference, tests = world
    together = remix(pathways, tests, reference, method, batch_size=9).outcomes
    reverse = remix(pathways, tests[::-1], reference, method, batch_size=4).outcomes[::-1]
    for number, sample in enumerate(tests):
        alone = remix(pathways, [sample], reference, method).outcomes[0]
        for other in (together[number], reverse[number]):
            assert same(alone.neighbors.indices, other.neighbors.indices)
            torch.testing.assert_close(alone.base, other.base, rtol=0, atol=1e-5)
            torch.testing.assert_close(alone.dense, other.dense, rtol=0, atol=1e-4)
            assert alone.changed is other.changed is True
    assert [one.sample for one in together] == list(tests)


@pytest.mark.parametrize("method", [Turned(), NGD(optimizer="gd", lr=1.0)])
def test_permuting_options_permutes_their_scores(world, method):
    """And changes nothing else: options do not see each other, nor do methods see the sample's."""
    pathways, reference, tests = world
    turned = [
        replace(
            one,
            question=replace(one.question, options=one.question.options[::-1]),
            gold=len(one.question.options) - 1 - one.gold,
        )
        for one in tests
    ]
    plain = remix(pathways, tests, reference, method).outcomes
    moved = remix(pathways, turned, reference, method).outcomes
    for one, other in zip(plain, moved, strict=True):
        torch.testing.assert_close(one.hard, other.hard.flip(0), rtol=0, atol=1e-5)
        assert one.correct == other.correct
        assert same(one.neighbors.indices, other.neighbors.indices)


def test_hard_and_dense_are_what_the_model_says(world):
    """Scores are those of the returned values, with K experts and with the whole core."""
    pathways, reference, tests = world
    found = remix(pathways, tests, reference, NGD(steps=2, core=6), batch_size=4)
    with torch.no_grad():
        for outcome in found.outcomes:
            reading = pathways.read([outcome.sample.question])[0]
            batch = pathways.batch([outcome.sample.question], [reading.state])
            assert int(outcome.values.isfinite().sum(-1).max()) == 6
            for width, expected in ((3, outcome.hard), (6, outcome.dense)):
                pathway = Pathway(outcome.values[None], outcome.mass[None], width)
                again = scores(pathways.score(batch, pathway), [outcome.sample])[0]
                torch.testing.assert_close(again, expected, rtol=0, atol=1e-5)
    assert any(not torch.allclose(one.hard, one.dense, atol=1e-4) for one in found.outcomes)


def test_a_shift_is_scored_as_wide_as_it_was_found(fake):
    """In mode `add` dense scores call the core, as the descent did, and not all experts."""
    pathways, reference, tests = fake
    found = remix(pathways, tests, reference, NGD(steps=2, core=3, parameter="add"))
    for outcome in found.outcomes:
        batch = pathways.batch([outcome.sample.question], [{}])
        for core, same in ((3, True), (6, False)):
            pathway = Pathway(outcome.values[None], outcome.mass[None], core, "add")
            again = scores(pathways.score(batch, pathway), [outcome.sample])[0]
            assert torch.allclose(again, outcome.dense, atol=1e-6) is same


def test_shifts_are_refused_before_any_work(world):
    """Pathways that were not opened for shifts, and a method that makes some."""
    pathways, reference, tests = world
    with pytest.raises(ConfigError, match="shift=True"):
        outcomes(pathways, tests, reference, Turned("add"))


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_a_caller_without_gradients_gets_the_same(world, around):
    """The descent has gradients of its own."""
    pathways, reference, tests = world
    expected = remix(pathways, tests, reference, NGD(steps=2)).outcomes
    with around():
        found = remix(pathways, tests, reference, NGD(steps=2)).outcomes
    for one, other in zip(expected, found, strict=True):
        assert other.changed
        torch.testing.assert_close(other.hard, one.hard, rtol=0, atol=1e-5)


def replayed(found: Remix, edit, lm):
    """(outcome, option) → score, by full passes over prompts with options, padded right."""
    rows = [
        one.sample.question.prompt + option
        for one in found.outcomes for option in one.sample.question.options
    ]  # fmt: skip
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    with torch.no_grad(), em.record(lm, edit):
        logprobs = lm(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
    answers, row = [], 0
    for one in found.outcomes:
        begin, mine = len(one.sample.question.prompt), []
        for option in one.sample.question.options:
            at = torch.arange(begin - 1, begin - 1 + len(option))
            mine.append(logprobs[row, at, torch.tensor(option)].sum())
            row += 1
        answers.append(torch.stack(mine))
    return answers


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3"])
@pytest.mark.parametrize("mode", ["set", "add"])
@pytest.mark.parametrize(("decisions", "scored"), [(1, False), (3, False), (1, True)])
def test_the_intervention_repeats_the_answers(family, mode, decisions, scored):
    """`record(model, remix.intervention(options=True))`, from JSON too, gives the hard scores."""
    with open_suffix(
        family, decisions=decisions, scored=scored, shift=mode == "add", copy=1
    ) as pathways:
        reference = ReferenceSet.build(pathways, samples(30))
        found = remix(pathways, samples(6, seed=7), reference, Turned(mode))
    assert all(one.changed for one in found.outcomes)
    edit = found.intervention(options=True)
    for again in (edit, em.from_json(edit.to_json())):
        for outcome, expected in zip(
            found.outcomes, replayed(found, again, model(family, 1)), strict=True
        ):
            torch.testing.assert_close(outcome.hard, expected, rtol=0, atol=1e-5)
            assert not torch.allclose(outcome.base, outcome.hard, atol=1e-5)


def test_the_intervention_edits_prompts_that_are_generated_from(world):
    """By default it counts from the prompt's end, left padding or not, and edits no other token."""
    pathways, reference, tests = world
    found = remix(pathways, tests, reference, Turned())
    prompts = [one.question.prompt for one in tests]
    width = max(map(len, prompts))
    ids = torch.tensor([[*[0] * (width - len(one)), *one] for one in prompts])
    mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in prompts])
    with torch.no_grad(), em.record(model(), found.intervention()) as trace:
        output = model()(input_ids=ids, attention_mask=mask).logits[:, -1].log_softmax(-1)
    for number, outcome in enumerate(found.outcomes):
        for option, text in enumerate(outcome.sample.question.options):
            if len(text) == 1:
                torch.testing.assert_close(
                    output[number, text[0]], outcome.hard[option], rtol=0, atol=1e-5
                )
    edited = [
        (int(row), int(place))
        for row, place in zip(trace.tokens.sample, trace.tokens.position, strict=True)
    ]
    with torch.no_grad(), em.record(model()) as plain:
        model()(input_ids=ids, attention_mask=mask)
    first = pathways.sites[0].site
    moved = (trace[first].dense() - plain[first].dense()).abs().amax(1) > 1e-6
    where = {edited[number] for number in moved.nonzero().flatten().tolist()}
    assert where == {(row, len(one) - 1) for row, one in enumerate(prompts)}


def test_the_intervention_is_for_the_rows_that_are_named(world):
    """Some samples, in another order, in other rows."""
    pathways, reference, tests = world
    found = remix(pathways, tests, reference, Turned())
    picked = found.intervention([4, 2], rows=[[7], [1]])
    assert {row for part in picked.parts() for row in part.samples} == {1, 7}
    assert {part.positions for part in picked.parts()} == {(-1,)}
    assert {part.sites for part in picked.parts()} == {str(info.site) for info in pathways.sites}
    with pytest.raises(ConfigError, match="need as many lists"):
        found.intervention([4, 2], rows=[[7]])
    with pytest.raises(ConfigError, match="rows are named"):
        found.intervention([0], rows=[list(range(9))], options=True)


def test_a_poisoned_item_changes_no_other():
    """What is NaN in the plain pass, in a loss, or in a neighbor stays with its sample."""
    clean, sick = FakePathways(pull=0.6), FakePathways(pull=0.6, unreadable=[6], broken=[7])
    tests = topical(9, seed=3)
    for method in (Turned(), NGD(steps=3)):
        reference = ReferenceSet.build(clean, topical(40, topics=(5, 6)))
        expected = remix(clean, tests, reference, method, batch_size=9).outcomes
        found = remix(sick, tests, reference, method, batch_size=9).outcomes
        for one, other in zip(expected, found, strict=True):
            topic = one.sample.question.prompt[0]
            if topic == 6:
                assert other.reason == "the plain pass is not finite"
                assert other.neighbors is None
            elif topic == 7:
                assert other.reason == "loss is not finite"
                assert same(other.hard, one.base)
            else:
                assert one.changed
                assert same(other.hard, one.hard)
                assert same(other.values, one.values)
            assert other.changed is (topic == 5)


def test_neighbors_that_are_not_finite_leave_the_base():
    """A surrogate of NaN: the base's routing, and the reason."""
    tests = topical(4, seed=3, topics=(5,))
    reference = ReferenceSet.build(FakePathways(pull=0.6), topical(20, topics=(7,)))
    found = remix(FakePathways(pull=0.6, broken=[7]), tests, reference, NGD(steps=3))
    for one in found.outcomes:
        assert one.reason == "loss is not finite"
        assert same(one.hard, one.base)


def test_an_oracle_needs_no_neighbors(fake):
    """A method that looks at no neighbor works without one."""
    pathways, reference, tests = fake
    found = remix(pathways, tests, reference, Oracle(NGD(lr=0.3)), neighbors=Neighbors(0))
    assert all(one.changed for one in found.outcomes)
    assert all(float(one.dense[0]) > float(one.base[0]) for one in found.outcomes)


def test_neighbors_of_the_same_kind_help(fake):
    """In the analytic world NGD raises the right option's score."""
    pathways, reference, tests = fake
    better = remix(
        pathways, tests, reference, NGD(lr=0.3), neighbors=Neighbors(max_similarity=None)
    ).outcomes
    gains = [float(one.dense[0] - one.base[0]) for one in better]
    assert min(gains) > 0


def test_outcomes_are_plain_values_on_demand(world):
    """A row is JSON, whatever happened to the sample."""
    pathways, reference, tests = world
    gates = (Gate(), Gate(max_margin=0.0))
    for gate in gates:
        for outcome in outcomes(pathways, tests, reference, NGD(steps=1), gate=gate):
            row = json.loads(json.dumps(outcome.row(), allow_nan=False))
            assert row["number"] == outcome.number
            assert row["hard_answer"] == int(outcome.hard.argmax())
            assert row["hard_correct"] == (row["hard_answer"] == outcome.sample.gold)
            assert len(row["neighbors"]) == len(row["neighbor_weights"]) == 3
            assert row["changed"] == (row["reason"] == "")
            assert set(row["seconds"]) >= {"read", "neighbors"}
    sick = FakePathways(unreadable=[6])
    own = ReferenceSet.build(FakePathways(pull=0.9), topical(9))
    bad = replace(own, meta=replace(own.meta, fingerprint=sick.fingerprint()))
    for outcome in outcomes(sick, topical(3), bad, Turned()):
        json.dumps(outcome.row(), allow_nan=False)


def test_outcomes_come_batch_by_batch(fake):
    """A caller can store what is done, and go on later with the rest, to the same end."""
    pathways, reference, tests = fake
    told: list[tuple[int, int]] = []
    running = outcomes(
        pathways, tests, reference, Turned(), batch_size=3,
        progress=lambda stage, done, total: told.append((done, total)),
    )  # fmt: skip
    first = [next(running) for _ in range(3)]
    assert told == []
    pathways.passes = 0
    rest = [tests[number] for number in range(len(tests))
            if number not in {one.number for one in first}]  # fmt: skip
    later = remix(pathways, rest, reference, Turned(), batch_size=3).outcomes
    whole = remix(pathways, tests, reference, Turned(), batch_size=3)
    expected = {one.sample: one.hard for one in whole.outcomes}
    for one in (*first, *later):
        torch.testing.assert_close(one.hard, expected[one.sample])
    assert set(whole.seconds) == {"read", "neighbors", "states", "solve", "evaluate"}


def test_one_option_and_no_gold_are_fine(world):
    """Free text is scored; what is not known is not judged."""
    pathways, reference, _ = world
    test = Sample(Question((5, 11, 12), ((20, 21, 22),)))
    outcome = remix(pathways, [test], reference, NGD(steps=2)).outcomes[0]
    assert outcome.changed
    assert outcome.hard.shape == (1,)
    assert outcome.correct == {"base": None, "dense": None, "hard": None}


def test_given_embeddings_find_neighbors(fake):
    """Where the references' vectors were given, the samples' are too."""
    pathways, _, tests = fake
    vectors = torch.eye(30)
    reference = ReferenceSet.build(pathways, topical(30), embedding=vectors)
    mine = reference.embeddings[[3, 0, 1, 2, 4, 5, 6, 7]] * 2
    settings = Neighbors(1, max_similarity=None)
    found = remix(pathways, tests, reference, Turned(), neighbors=settings, embeddings=mine)
    indices = [int(one.neighbors.indices) for one in found.outcomes]
    assert indices == [3, 0, 1, 2, 4, 5, 6, 7]
    with pytest.raises(ConfigError, match="were given"):
        remix(pathways, tests, reference, Turned())
    with pytest.raises(ConfigError, match="8 samples"):
        remix(pathways, tests, reference, Turned(), embeddings=mine[:3])


def test_references_without_states_serve_as_well(world):
    """Neighbors are read again, once, and the answers are the same."""
    pathways, reference, tests = world
    small = ReferenceSet.build(pathways, samples(40), states=False)
    expected = remix(pathways, tests, reference, NGD(steps=2, optimizer="gd", lr=1.0)).outcomes
    found = remix(pathways, tests, small, NGD(steps=2, optimizer="gd", lr=1.0)).outcomes
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one.dense, other.dense, rtol=0, atol=1e-4)


def test_impossible_runs_are_told(fake):
    """References of another model, a batch of nothing; no samples give no outcomes."""
    pathways, reference, tests = fake
    with pytest.raises(FingerprintError):
        remix(FakePathways(seed=1), tests, reference, Turned())
    with pytest.raises(ConfigError, match="batch_size=0"):
        remix(pathways, tests, reference, Turned(), batch_size=0)
    assert len(remix(pathways, [], reference, Turned())) == 0
