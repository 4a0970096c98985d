"""Laws of contestants that are run on the questions of a task."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from expertmix.bindings.pathways import open_pathways
from expertmix.optimize.reference import ReferenceSet
from expertmix.study.contestants import contestants
from expertmix.study.loading import load_model
from expertmix.study.optimize_job import run_optimize
from expertmix.study.optimize_plan import plan_optimize
from expertmix.study.optimize_runs import Examples, Runner
from expertmix.study.optimize_settings import OptimizeJob

from .choosing import lines, questions
from .test_remembered import Counted

BATCH = 3


@pytest.fixture(scope="module")
def job(moe, tmp_path_factory) -> OptimizeJob:
    """Seven questions, and twenty to learn from."""
    folder = tmp_path_factory.mktemp("task")
    return OptimizeJob(
        model=str(moe), task=str(lines(folder / "task.jsonl", questions(7))), device="cpu",
        reference=str(lines(folder / "known.jsonl", questions(20, start=30))),
        method="ngd steps=2", controls=False, layers="last 2", batch_size=BATCH,
    )  # fmt: skip


@pytest.fixture(scope="module")
def world(job):
    """The plan, an open model that counts its plain passes, and references."""
    plan = plan_optimize(job)
    model = load_model(job.model, device="cpu")
    with open_pathways(model, layers="last 2", shift=True) as pathways:
        samples = [one.sample for one in plan.reference.asked]
        yield plan, pathways, ReferenceSet.build(pathways, samples)


def run(world, names, **settings) -> tuple[dict, list]:
    """Per contestant its answers without their times, and the plain passes that were done."""
    plan, pathways, reference = world
    counted = Counted(pathways)
    runner = Runner(
        counted, reference, plan.task.asked, neighbors=plan.job.neighbors, gate=plan.job.keeping,
        examples=Examples.of(plan.tokenizer, plan.context), batch_size=BATCH, **settings,
    )  # fmt: skip
    found = {}
    for one in names:
        scored = [s for batch in runner.run(one, range(7)) for s in batch.scored]
        assert all(answer.stages["read"] > 0 for answer in scored)
        found[one.name] = [replace(answer, seconds=0) for answer in scored]
    return found, counted.passes


@pytest.fixture(scope="module")
def everybody():
    """Two methods, one of which shifts, all controls and both bounds."""
    return contestants("ngd steps=2", ["kernel_regression", "ngd steps=2 parameter=add"])


def test_a_question_is_read_once(world, everybody):
    """However many contestants there are; without memory each of them reads all of them."""
    asked = {one.sample.question for one in world[0].task.asked}

    def plain(passes) -> int:
        return sum(asked.issuperset(batch) for batch in passes)

    remembered, passes = run(world, everybody)
    again, without = run(world, everybody, memory=0)
    assert plain(passes) == 3  # batches of three of seven questions
    assert plain(without) == 3 * len(everybody)
    assert remembered == again


def test_the_order_of_contestants_changes_nothing(world, everybody):
    """Bit for bit: none of them leaves anything behind."""
    mixed = random.Random(0).sample(everybody, len(everybody))
    assert run(world, mixed)[0] == run(world, everybody)[0]


def test_the_same_run_gives_the_same_numbers(job):
    """Nothing is drawn that the seed does not decide."""
    one, two = (run_optimize(replace(job, controls=True)) for _ in range(2))
    for a, b in zip(one.rows, two.rows, strict=True):
        assert replace(a, seconds=0) == replace(b, seconds=0)


@pytest.mark.parametrize("scored", [False, True])
def test_an_item_alone_scores_as_in_a_batch(job, scored):
    """To rounding, whatever else is asked with it."""
    together = run_optimize(replace(job, scored=scored))
    alone = run_optimize(replace(job, scored=scored, batch_size=1))
    for a, b in zip(together.rows, alone.rows, strict=True):
        assert a.scores == pytest.approx(b.scores, abs=1e-4)
        assert a.neighbors == b.neighbors


def test_permuted_options_have_permuted_scores(job, tmp_path):
    """To rounding; who is a neighbor, and whether the answer is right, stays."""
    rows = questions(7)
    turned = [
        {**row, "choices": row["choices"][1:] + row["choices"][:1], "gold": (row["gold"] - 1) % 3}
        for row in rows
    ]
    one, two = (
        run_optimize(replace(job, task=str(lines(tmp_path / f"{number}.jsonl", asked))))
        for number, asked in enumerate((rows, turned))
    )
    for a, b in zip(one.rows, two.rows, strict=True):
        assert b.scores == pytest.approx(a.scores[1:] + a.scores[:1], abs=1e-4)
        assert (a.correct, a.neighbors) == (b.correct, b.neighbors)
        assert a.loss == pytest.approx(b.loss, abs=1e-4)
