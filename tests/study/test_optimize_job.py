from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

import expertmix as em
from expertmix.core.serialize import from_json
from expertmix.errors import (
    ConfigError,
    ContextLengthError,
    ExpertmixError,
    FingerprintError,
    NoSitesError,
    OutputError,
    UnknownSiteError,
)
from expertmix.study import optimize_job
from expertmix.study.ledger import Ledger
from expertmix.study.loading import load_model
from expertmix.study.optimize_job import LEDGER, run_optimize
from expertmix.study.optimize_plan import plan_optimize
from expertmix.study.optimize_settings import OptimizeJob

from .choosing import lines, questions
from .conftest import everything


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Path:
    """Seven questions."""
    return lines(tmp_path_factory.mktemp("task") / "task.jsonl", questions(7))


@pytest.fixture(scope="module")
def known(tmp_path_factory) -> Path:
    """Questions of which some are answered right."""
    return lines(tmp_path_factory.mktemp("known") / "known.jsonl", questions(20, start=30))


@pytest.fixture(scope="module")
def job(moe, task, known) -> OptimizeJob:
    """Two methods, no controls, batches of three."""
    return OptimizeJob(
        model=str(moe), task=str(task), reference=str(known), method="ngd steps=2", device="cpu",
        against=("kernel_regression alpha=0.5",), controls=False, layers="last 2", batch_size=3,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(job):
    """What the job gives when nothing interrupts it."""
    return run_optimize(job)


def without_time(done) -> list:
    return [replace(row, seconds=0) for row in done.rows]


TIMES = ("seconds", "stages")


def timeless(found) -> list[dict]:
    """Rows without what a clock says."""
    return [{key: value for key, value in row.items() if key not in TIMES} for row in found]


def table(folder: Path) -> list[dict]:
    return timeless(pq.read_table(folder / "results.parquet").to_pylist())


def test_every_item_has_a_row_per_contestant(job, tmp_path):
    """In order; the base's scores are the same in all of them; files are what was promised."""
    plan = plan_optimize(replace(job, out=tmp_path / "out"))
    done = run_optimize(replace(job, out=tmp_path / "out"))
    rows = table(tmp_path / "out")
    names = ["base", "ngd steps=2", "kernel_regression alpha=0.5"]
    assert [(row["method"], row["item"]) for row in rows] == [
        (n, i) for n in names for i in range(7)
    ]
    for row in rows:
        assert row["base_scores"] == rows[row["item"]]["scores"]
        assert row["method"] == "base" or len(row["neighbors"][0]) == 3
    changed = [row for row in rows if row["changed"]]
    assert any(row["scores"] != row["base_scores"] for row in changed)
    assert any(len(row["losses"][0]) == 3 for row in changed if row["method"] == "ngd steps=2")
    files = [name for name in everything(tmp_path / "out") if not name.startswith("reference-")]
    assert sorted(files) == sorted(plan.files)
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found == done.figures
    written = pq.read_table(tmp_path / "out" / "results.parquet").to_pylist()
    for line in found["results"]:
        own = [row for row in written if row["method"] == line["method"]]
        spent = sum(row["seconds"] for row in own)
        read = sum(json.loads(row["stages"])["read"] for row in own)
        assert line["relative_cost"] == pytest.approx(spent / read, abs=1e-3)
        assert line["loss"] == pytest.approx(sum(row["loss"] for row in own) / 7, abs=1e-4)
        assert line["accuracy"]["value"] == pytest.approx(
            sum(row["correct"] for row in own) / 7, abs=1e-4
        )
    assert [line["method"] for line in found["results"]] == names
    assert found["exact_suffix"]
    assert 0 < found["references_kept"] <= found["references_tried"] == 20


@pytest.mark.parametrize("batches", [0, 1, 3, 5, 8])
def test_a_killed_run_goes_on_where_it_stopped(job, whole, tmp_path, monkeypatch, batches):
    """Killed behind any batch: the same rows, bit for bit, and no batch is computed twice."""
    out = replace(job, out=tmp_path / "out", interventions=True)
    append, count = Ledger.append, [0]

    def stop_after(book, rows):
        if count[0] == batches:
            raise KeyboardInterrupt
        count[0] += 1
        append(book, rows)

    monkeypatch.setattr(Ledger, "append", stop_after)
    with pytest.raises(KeyboardInterrupt):
        run_optimize(out)
    assert not (tmp_path / "out" / "results.json").exists()
    monkeypatch.setattr(Ledger, "append", append)
    done = run_optimize(out)
    assert done.resumed > 0 or not batches
    assert without_time(done) == without_time(whole)
    assert not (tmp_path / "out" / LEDGER).exists()
    assert (tmp_path / "out" / "interventions-ngd-steps=2.json").exists()


def test_other_settings_do_not_go_on(job, tmp_path, monkeypatch):
    """An unfinished run is told; restart discards it."""
    out, calls = replace(job, out=tmp_path / "out"), [0]
    append = Ledger.append

    def stop_second(book, rows):
        calls[0] += 1
        if calls[0] == 2:
            raise KeyboardInterrupt
        append(book, rows)

    monkeypatch.setattr(Ledger, "append", stop_second)
    with pytest.raises(KeyboardInterrupt):
        run_optimize(out)
    monkeypatch.setattr(Ledger, "append", append)
    with pytest.raises(ConfigError, match="unfinished run with other settings: neighbors"):
        run_optimize(replace(out, k=2))
    assert run_optimize(replace(out, k=2, restart=True)).resumed == 0


def test_no_neighbors_is_the_base_bit_for_bit(job):
    """k = 0: every method refuses, says so, and scores as the base does."""
    done = run_optimize(replace(job, k=0))
    for row in done.rows:
        assert row.scores == row.base
        assert row.changed == 0
        assert row.method == "base" or row.refused == ["no neighbors"]
    assert done.lines[1].refused == {"no neighbors": 7}


def test_all_neighbors_may_be_filtered_out(job):
    """Whatever needs them is the base then, controls too; nothing fails."""
    done = run_optimize(replace(job, near=("max_similarity=-1",), controls=True, limit=3))
    alone = [row for row in done.rows if row.kind == "method" or row.method == "neighbor vote"]
    assert all(row.scores == row.base and row.neighbors == [[]] for row in alone)
    assert "left the routing of 3 of 3 items alone: no neighbors (3)" in " ".join(done.said)


def test_controls_stand_beside_the_methods(job):
    """All of them run; the wrong-label oracle and the oracle pull apart, or change nothing."""
    done = run_optimize(replace(job, controls=True, against=(), limit=4))
    names = [line.method for line in done.lines]
    assert names == [
        "base", "ngd steps=2", "ngd steps=2, random neighbors", "ngd steps=2, shuffled labels",
        "neighbor vote", "in-context learning", "global_delta", "oracle", "wrong_oracle",
    ]  # fmt: skip
    rows = {name: [row for row in done.rows if row.method == name] for name in names}
    assert any(
        a.neighbors != b.neighbors
        for a, b in zip(rows["ngd steps=2"], rows["ngd steps=2, random neighbors"], strict=True)
    )
    oracle, wrong = (sum(row.loss for row in rows[name]) for name in ("oracle", "wrong_oracle"))
    assert oracle < wrong
    assert all(
        row.notes["examples"] != [0] for row in rows["in-context learning"] if row.neighbors[0]
    )


def test_letters_are_averaged_over_all_shifts(job):
    """An item is asked once per option; its row has what happened in each order."""
    done = run_optimize(replace(job, style="letters", limit=3, against=()))
    assert len(done.rows) == 6
    assert all(len(row.neighbors) == 3 for row in done.rows if row.method != "base")
    once = run_optimize(replace(job, style="letters", permute=False, limit=3, against=()))
    assert all(len(row.refused) == 1 for row in once.rows)


def test_a_free_text_has_a_loss(job, tmp_path):
    """One answer each; what chooses among options is left out."""
    rows = [{"prompt": f"one {n} two", "answer": f"three {n}"} for n in range(6)]
    text = lines(tmp_path / "text.jsonl", rows[:3])
    other = lines(tmp_path / "other.jsonl", rows[3:])
    done = run_optimize(
        replace(job, task=str(text), reference=str(other), controls=True, against=())
    )
    names = {line.method for line in done.lines}
    assert {"ngd steps=2, random neighbors", "oracle"} <= names
    assert not names & {"neighbor vote", "wrong_oracle", "ngd steps=2, shuffled labels"}
    assert all(row.correct is None for row in done.rows)
    assert done.tables[0].title == "Loss and cost"


def test_interventions_replay_what_was_found(job, task, tmp_path):
    """Read back, they give the prompts of the whole task the routing of each item."""
    out = replace(job, out=tmp_path / "out", interventions=True, against=())
    done = run_optimize(out)
    found = from_json((tmp_path / "out" / "interventions-ngd-steps=2.json").read_text())
    plan = plan_optimize(out)
    prompts = [one.sample.question.prompt for one in plan.task.asked]
    width = max(map(len, prompts))
    ids = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts])
    real = torch.tensor([[1] * len(p) + [0] * (width - len(p)) for p in prompts])
    model = load_model(job.model, device="cpu")
    with torch.no_grad(), em.record(model) as before:
        model(input_ids=ids, attention_mask=real)
    with torch.no_grad(), em.record(model, found) as after:
        model(input_ids=ids, attention_mask=real)
    site = plan.sites[0].site
    for row, item in zip([r for r in done.rows if r.kind == "method"], range(7), strict=True):
        mine = before.tokens.real & (before.tokens.sample == item)
        same = torch.equal(before[site].dense()[mine], after[site].dense()[mine])
        assert same == (row.changed == 0)


def test_text_is_written_only_when_asked(job, tmp_path):
    """By default no question is in any file but the reference set's own."""
    run_optimize(replace(job, out=tmp_path / "a", against=()))
    run_optimize(replace(job, out=tmp_path / "b", against=(), text=True))
    assert b"which color" not in (tmp_path / "a" / "results.parquet").read_bytes()
    assert "prompt" in table(tmp_path / "b")[0]


def test_a_reference_set_is_used_as_it_is(job, whole, tmp_path):
    """A folder that was built before gives what its questions gave."""
    run_optimize(replace(job, out=tmp_path / "out"))
    (folder,) = (tmp_path / "out").glob("reference-*")
    shutil.move(folder, tmp_path / "set")
    again = run_optimize(replace(job, reference=str(tmp_path / "set")))
    assert without_time(again) == without_time(whole)


def test_a_folder_without_references_is_told_first(job, tmp_path):
    """Before any weights are read, with what to name instead."""
    run_optimize(replace(job, out=tmp_path / "out", against=(), limit=1))
    with pytest.raises(ConfigError, match=r"no finished reference set.*reference-… folder"):
        plan_optimize(replace(job, reference=str(tmp_path / "out")))


def test_scored_tokens_are_decision_tokens_too(job, tmp_path):
    """Other scores, the same references; a run without them is another run."""
    plain, scored = (
        run_optimize(replace(job, out=tmp_path / "out", scored=on)) for on in (False, True)
    )
    assert len(list((tmp_path / "out").glob("reference-*"))) == 1
    assert scored.figures["scored"]
    assert "all of the options" in (tmp_path / "out" / "report.html").read_text()
    changed = [(a, b) for a, b in zip(plain.rows, scored.rows, strict=True) if a.kind == "method"]
    assert any(a.scores != b.scores for a, b in changed)
    assert all(a.base == b.base and a.neighbors == b.neighbors for a, b in changed)
    one, two = (plan_optimize(replace(job, scored=on)).identity("") for on in (False, True))
    assert [key for key in one if one[key] != two[key]] == ["scored"]


def test_the_references_of_another_model_are_refused(job, other_moe, tmp_path):
    """Their pathways mean nothing there."""
    run_optimize(replace(job, out=tmp_path / "out"))
    (folder,) = (tmp_path / "out").glob("reference-*")
    with pytest.raises(FingerprintError, match="another model"):
        run_optimize(replace(job, model=str(other_moe), reference=str(folder)))


def test_adapters_are_routed_too(job, base, library):
    """LoRA routing is re-mixed by full passes, with every adapter's site where they are."""
    done = run_optimize(
        replace(
            job, model=str(base), adapters=str(library), router="spectr top_k=1", limit=2,
            layers="model.layers.1.mlp.up_proj", against=(), reference_limit=6,
        )
    )  # fmt: skip
    assert not done.figures["exact_suffix"]
    assert len(done.rows) == 4


def test_a_limit_is_a_seeded_draw(job):
    """Not the first items: public sets are sorted. It keeps their order."""
    names = [
        [item.name for item in plan_optimize(replace(job, limit=4, seed=seed)).task.items]
        for seed in (0, 0, 1)
    ]
    assert names[0] == names[1] != names[2]
    assert all(one == sorted(one) and len(one) == 4 for one in names)


@pytest.mark.parametrize(
    ("rows", "kind", "said"),
    [
        ([], ConfigError, "holds no item"),
        ([{"query": "q", "choices": ["a"], "gold": 0}], ConfigError, "one choice only"),
        ([{"query": "q", "choices": ["a", "b"], "gold": 2}], ConfigError, "gold is 2"),
        ([{"query": "q" * 127, "choices": ["a", "b"], "gold": 1}], ContextLengthError, "'bad-1'"),
        ([{"query": "q", "choices": ["a", "a"], "gold": 0}], ConfigError, "the same text"),
    ],
)
@pytest.mark.parametrize("key", ["task", "reference"])
def test_bad_items_are_refused_before_weights_are_read(job, tmp_path, key, rows, kind, said):
    """In the task and among the references alike, and no folder is left."""
    bad = lines(tmp_path / "bad.jsonl", rows)
    wrong = replace(job, **{key: str(bad)}, out=tmp_path / "out")
    with pytest.raises(kind, match=said):
        plan_optimize(wrong)
    with pytest.raises(kind, match=said):
        run_optimize(wrong)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "kind", "said"),
    [
        ({"task": "arc_hard"}, ConfigError, "no public set of that name; known: arc_challenge"),
        ({"method": "ndg"}, ConfigError, "did you mean 'ngd'"),
        ({"settings": ("step=2",)}, ConfigError, "no setting 'step'"),
        ({"against": ("ngd steps=2",)}, ConfigError, "named twice"),
        ({"layers": "7"}, UnknownSiteError, "layer 7 has no routed module"),
        ({"layers": "*.attention"}, UnknownSiteError, "no site matches"),
        ({"near": ("kernel=wide",)}, ConfigError, "wide"),
        ({"near": ("kernal=linear",)}, ConfigError, "no setting 'kernal'"),
        ({"near": ("k=four",)}, ExpertmixError, "k"),
        ({"gate": ("margin=1",)}, ConfigError, "no setting 'margin'"),
        ({"gate": ("max_distance=2",)}, ConfigError, "quantile"),
        ({"k": -1}, ConfigError, "k=-1"),
        ({"batch_size": 0}, ConfigError, "batch_size"),
        ({"decisions": 0}, ConfigError, "decisions"),
        ({"limit": 0}, ConfigError, "limit"),
        ({"router": "arrow"}, ConfigError, "name --adapters"),
        ({"adapters": "nowhere/at/all"}, ExpertmixError, "nowhere"),
    ],
)
def test_wrong_settings_are_refused_before_weights_are_read(job, changes, kind, said):
    """With what is known instead."""
    with pytest.raises(kind, match=said):
        plan_optimize(replace(job, **changes))


def test_a_dense_model_has_nothing_to_route(job, dense):
    """Told before its weights are read."""
    with pytest.raises(NoSitesError):
        plan_optimize(replace(job, model=str(dense)))


def test_no_successes_are_told_and_leave_nothing_in_the_way(job, tmp_path):
    """The next run, with other references, is not taken for the same."""
    out = replace(job, out=tmp_path / "out", against=(), limit=1)
    plan = plan_optimize(out)
    run_optimize(out)
    (folder,) = (tmp_path / "out").glob("reference-*")
    kept = {sample.name for sample in em.ReferenceSet.load(folder).samples}
    item = next(item for item in plan.reference.items if item.name not in kept)
    row = {"query": item.prompt, "choices": item.choices, "gold": item.gold, "name": item.name}
    bad = lines(tmp_path / "bad.jsonl", [row])
    with pytest.raises(ConfigError, match="right"):
        run_optimize(replace(out, reference=str(bad)))
    assert run_optimize(out).resumed == 0


def test_a_folder_that_cannot_be_written_is_told_first(job, locked, tmp_path):
    """Before the model is opened; also where a file is in the way."""
    with pytest.raises(OutputError):
        run_optimize(replace(job, model="nowhere/at/all", out=locked / "out"))
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        run_optimize(replace(job, model="nowhere/at/all", out=tmp_path / "file"))


def test_joined_interventions_have_one_part_per_site(job):
    """However many batches they come from."""
    parts = [
        em.InOrder(
            em.Reweight("*.0.mlp", [[1.0, 0.0]], stage="weights", samples=(n,), positions=(-1,))
        ).to_dict()
        for n in range(3)
    ]
    (part,) = optimize_job.joined(parts).parts()
    assert part.samples == (0, 1, 2)
    assert part.values.tolist() == [[1.0, 0.0]] * 3
