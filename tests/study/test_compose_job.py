"""The results folder of a composition, on a tiny Llama with adapters made by PEFT."""

from __future__ import annotations

import json

import pytest

import expertmix as em
from expertmix.errors import ConfigError
from expertmix.study import compose_job
from expertmix.study.compose_job import run_compose
from expertmix.study.compose_plan import ComposeJob, plan_compose

from .composing import ADAPTERS, MODULES, TEXTS, write
from .conftest import everything

FILES = ["answers.jsonl", "report.html", "results.json", "trace.parquet"]


@pytest.fixture
def job(base, library, asked, tmp_path):
    """A job with other fields than these."""

    def make(**fields):
        known = {
            "base": str(base), "library": str(library), "prompts": asked, "out": tmp_path / "out",
            "router": "spectr", "max_new_tokens": 6, "device": "cpu",
        }  # fmt: skip
        return ComposeJob(**{**known, **fields})

    return make


def rows(folder):
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


def test_the_folder_holds_what_was_asked_for(job):
    """Answers, trace, results and page; what is returned is what is written."""
    done = run_compose(job())
    assert everything(done.folder) == FILES
    assert json.loads((done.folder / "results.json").read_text()) == done.figures
    found = rows(done.folder)
    assert [row["where"] for row in found] == [f"asked.jsonl:{n}" for n in range(1, 6)]
    assert [row["label"] for row in found] == [label for _, label in TEXTS]
    for row in found:
        assert list(row["shares"]) == list(ADAPTERS)
        assert all(token["adapter"] in (None, *ADAPTERS) for token in row["tokens"])
    trace = em.Trace.load(done.folder / "trace.parquet")
    assert len(trace.sites) == MODULES
    assert trace.labels == dict(enumerate(label for _, label in TEXTS))
    assert {layer["site"] for layer in done.figures["by_layer"]} == {
        "model.layers.0#0", "model.layers.1#0",
    }  # fmt: skip
    assert len(done.figures["by_kind"]) == 7


def test_prompts_and_words_are_kept_only_when_asked_for(job):
    """Neither the page nor any other file has them otherwise; answers stand in answers.jsonl."""
    secret = TEXTS[3][0]
    done = run_compose(job())
    assert em.Trace.load(done.folder / "trace.parquet").text is None
    for file in done.folder.iterdir():
        assert secret.encode() not in file.read_bytes(), file.name
    page = (done.folder / "report.html").read_text()
    assert "The words were left out" in page
    done = run_compose(job(text=True))
    assert rows(done.folder)[3]["prompt"] == secret
    text = em.Trace.load(done.folder / "trace.parquet").text
    assert text is not None
    assert secret in "".join(text)
    page = (done.folder / "report.html").read_text()
    assert "The words were left out" not in page
    assert f'<p class="asked">{secret}</p>' in page


def test_without_a_folder_nothing_is_written(job, tmp_path, monkeypatch):
    """The same answers come back."""
    written = run_compose(job())
    monkeypatch.chdir(tmp_path)
    before = everything(tmp_path)
    done = run_compose(job(out=None))
    assert everything(tmp_path) == before
    assert [row["answer"] for row in done.rows] == [r["answer"] for r in rows(written.folder)]
    assert done.figures["files"] == []


def test_labels_that_name_adapters_are_checked(job):
    """How often tokens and texts go to their own adapter: in tables, results and page."""
    done = run_compose(job(router="oracle"))
    found = done.figures["evaluation"]["routers"]["oracle"]
    assert found["own_token"] == [1.0, 1.0, 1.0]
    assert found["confusion"]["bob"] == [0.0, 1.0, 0.0]
    assert "Does each text reach its own adapter?" in (done.folder / "report.html").read_text()
    assert [table.title for table in done.tables] == ["How the texts are read"]
    shares = [row["shares"][row["label"]] for row in done.rows]
    assert shares == [1.0] * 5


def test_routers_are_compared_on_the_prompts(job):
    """Each with its loss, its difference to the first, and by label."""
    against = ("arrow", "spectr top_k=1 score=energy", "uniform", "base", "oracle")
    done = run_compose(job(against=against))
    found = done.figures["evaluation"]
    assert list(found["routers"]) == ["spectr", *against]
    assert found["main"] == "spectr"
    for routed in found["routers"].values():
        assert list(routed["by_label"]) == list(ADAPTERS)
        assert len(routed["losses"]) == 5
    assert [table.title for table in done.tables] == [
        "Routers on the same texts", "Loss by text and router",
    ]  # fmt: skip
    page = (done.folder / "report.html").read_text()
    assert all(table.title in page for table in done.tables)


def test_without_labels_and_rivals_nothing_is_read(job, plain):
    """There is nothing to compare; with rivals alone, losses are."""
    assert run_compose(job(prompts=plain)).figures["evaluation"] is None
    found = run_compose(job(prompts=plain, against=("base",))).figures["evaluation"]
    assert found["routers"]["base"]["loss"][0] > 0
    assert found["routers"]["spectr"]["own_token"] is None


def test_any_text_calibrates(job, plain):
    """The router says so; a router that pools evidence calibrates itself without any."""
    one = "spectr top_k=1"
    done = run_compose(job(router=one, calibrate=plain, against=(one,)))
    assert list(done.figures["evaluation"]["routers"]) == [f"{one}, calibrated", one]
    assert done.figures["settings"].startswith("Calibrated(")
    losses = [found["losses"] for found in done.figures["evaluation"]["routers"].values()]
    assert losses[0] != losses[1]
    pooled = run_compose(job(router="pooled", out=None))
    assert "Calibrated(" in pooled.figures["settings"]


def test_rivals_are_not_calibrated_on_the_text_of_the_main_router(job, plain):
    """`pooled` beside a calibrated `pooled` is what `pooled` is alone."""
    more = {"router": "pooled", "out": None}
    both = run_compose(job(calibrate=plain, against=("pooled",), **more)).figures["evaluation"]
    alone = run_compose(job(**more)).figures["evaluation"]
    assert both["routers"]["pooled"]["losses"] == alone["routers"]["pooled"]["losses"]
    assert both["routers"]["pooled, calibrated"]["losses"] != both["routers"]["pooled"]["losses"]


def test_what_a_run_depends_on_is_in_its_results(job, plain):
    """The seed, the template, and the text of the calibration."""
    found = plan_compose(job(seed=3, chat=True, calibrate=plain)).figures()
    assert (found["seed"], found["chat"], found["calibrate"]) == (3, True, str(plain))


def test_settings_and_combination_reach_the_model(job):
    """They are in the trace, and make a difference."""
    done = run_compose(job(settings=("top_k=1", "score=energy"), combination="aligned"))
    meta = em.Trace.load(done.folder / "trace.parquet").meta
    assert meta.settings["combination"] == "aligned"
    assert "score='energy'" in meta.settings["router"]
    assert {info.top_k for info in meta.sites} == {1}
    assert done.figures["router"] == "spectr top_k=1 score=energy"


def test_an_answer_may_be_empty(base, library, tmp_path, job):
    """The model ends at once: no token, no share, a page all the same."""
    config = json.loads((base / "generation_config.json").read_text())
    folder = tmp_path / "base"
    folder.mkdir()
    for file in base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    every = list(range(96))
    (folder / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": every}))
    done = run_compose(job(base=str(folder)))
    assert [row["answer"] for row in done.rows] == [""] * 5
    assert done.shares == (0.0, 0.0, 0.0)
    assert everything(done.folder) == FILES


def test_a_failure_leaves_nothing(job, monkeypatch, tmp_path):
    """Also a late one; older results stay."""

    def fail(*args: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(compose_job, "write_json", fail)
    with pytest.raises(OSError, match="no space"):
        run_compose(job())
    assert not (tmp_path / "out").exists()


def test_a_plan_reads_no_weights(job, base, tmp_path):
    """It says what would be run, on a base whose weights are broken."""
    folder = tmp_path / "base"
    folder.mkdir()
    for file in base.iterdir():
        (folder / file.name).write_bytes(
            b"" if file.suffix == ".safetensors" else file.read_bytes()
        )
    plan = plan_compose(job(base=str(folder), against=("base", "arrow")))
    found = plan.figures()
    assert found["sites"] == MODULES
    assert [one["name"] for one in found["adapters"]] == list(ADAPTERS)
    assert [one["rank"] for one in found["adapters"]] == [4, 2, 8]
    assert (found["samples"], found["readings"]) == (5, 3)
    assert sorted(found["files"]) == FILES


def test_a_chat_is_asked_but_texts_are_read_plain(job):
    """What is compared is the text itself."""
    plan = plan_compose(job(chat=True))
    assert plan.asked.tokens == plan.texts.tokens + 3 * len(TEXTS)


@pytest.mark.parametrize("against", [("arrow", "arrow"), ("spectr",)])
def test_a_router_is_not_compared_with_itself(job, against):
    """A name twice is a mistake."""
    with pytest.raises(ConfigError, match="named twice"):
        plan_compose(job(against=against))


def test_an_oracle_needs_labels_that_name_adapters(job, tmp_path):
    """The line is told, and what the library has."""
    prompts = write(tmp_path / "p.jsonl", [("a", "ada"), ("b", "poetry")])
    with pytest.raises(ConfigError, match=r"p.jsonl:2.*'poetry'.*ada, bob, cyd"):
        plan_compose(job(prompts=prompts, against=("oracle",)))
