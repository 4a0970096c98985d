from __future__ import annotations

import json

import pytest
from study.conftest import everything

import expertmix as em


def _trace(expertmix, model, prompts, out, *more: object):
    return expertmix("trace", model, "--prompts", prompts, "--out", out, *more)


def test_a_trace_names_what_it_wrote(expertmix, moe, prompts, tmp_path):
    """Three files, each on its line; nothing on stderr."""
    answer = _trace(expertmix, moe, prompts, tmp_path / "out")
    assert (answer.code, answer.err) == (0, "")
    for name in ("trace.parquet", "results.json", "report.html"):
        assert f"wrote {tmp_path / 'out' / name}" in answer.out.replace("\n", "")
    assert "maths" in answer.out


def test_json_is_all_there_is_on_stdout(expertmix, moe, prompts, tmp_path):
    """And it is the content of results.json."""
    answer = _trace(expertmix, moe, prompts, tmp_path, "--json", "--no-report")
    assert (answer.code, answer.err) == (0, "")
    assert json.loads(answer.out) == json.loads((tmp_path / "results.json").read_text())
    assert not (tmp_path / "report.html").exists()


def test_edits_by_name_and_number(expertmix, moe, prompts, tmp_path):
    """They are in the trace, and their effect is shown."""
    answer = _trace(
        expertmix, moe, prompts, tmp_path,
        "--ablate", "*.layers.1.mlp:python", "--ablate", "*:0", "--mask", "*:2,4",
    )  # fmt: skip
    assert answer.code == 0
    assert "what is lost" in answer.out
    edits = em.Trace.load(tmp_path / "trace.parquet").meta.interventions
    assert [(edit["kind"], edit["experts"]) for edit in edits] == [
        ("ablate", [3]), ("ablate", [0]), ("mask", [2, 4]),
    ]  # fmt: skip


def test_logits_and_text_on_demand(expertmix, moe, prompts, tmp_path):
    """Neither is kept otherwise."""
    _trace(expertmix, moe, prompts, tmp_path, "--no-report")
    trace = em.Trace.load(tmp_path / "trace.parquet")
    assert (trace.text, trace[trace.sites[0]].logits) == (None, None)
    _trace(expertmix, moe, prompts, tmp_path, "--no-report", "--text", "--logits")
    trace = em.Trace.load(tmp_path / "trace.parquet")
    assert trace.text is not None
    assert trace[trace.sites[0]].logits is not None


def test_a_dry_run_writes_nothing(expertmix, moe, prompts, tmp_path):
    """It says what would be done."""
    before = everything(tmp_path)
    answer = _trace(expertmix, moe, prompts, tmp_path / "out", "--dry-run", "--mask", "*:maths")
    assert answer.code == 0
    assert "3 prompts, 58 tokens; mask *:maths" in answer.out
    plan = _trace(expertmix, moe, prompts, tmp_path / "out", "--dry-run", "--json")
    assert json.loads(plan.out)["tokens"] == 58
    assert everything(tmp_path) == before


@pytest.fixture
def bad(moe, other_moe, dense, pickled, prompts, locked, tmp_path, expertmix):
    """Arguments of every kind of bad input, by name."""
    (tmp_path / "file").write_text("")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "long.txt").write_text("a" * 129)
    (tmp_path / "key.jsonl").write_text('{"text": "a"}\n{"text": "a", "txet": "b"}')
    _trace(expertmix, other_moe, prompts, tmp_path / "other", "--no-report")
    foreign = (tmp_path / "other" / "trace.parquet").rename(tmp_path / "foreign.parquet")
    (tmp_path / "cut.parquet").write_bytes(foreign.read_bytes()[:-20])
    out = tmp_path / "out"
    return {
        "dense": (dense, prompts, out),
        "pickle": (pickled, prompts, out),
        "no model": ("./nothing", prompts, out),
        "site": (moe, prompts, out, "--ablate", "*.layers.77.mlp:1"),
        "expert number": (moe, prompts, out, "--ablate", "*:9"),
        "expert name": (moe, prompts, out, "--mask", "*:poetry"),
        "address": (moe, prompts, out, "--mask", "poetry"),
        "too many masked": (moe, prompts, out, "--mask", "*:0,1,2,3,4,5,6,7"),
        "empty": (moe, tmp_path / "empty.txt", out),
        "no prompts": (moe, tmp_path / "none.txt", out),
        "long": (moe, tmp_path / "long.txt", out),
        "key": (moe, tmp_path / "key.jsonl", out),
        "corrupt": (moe, prompts, out, "--replay", tmp_path / "cut.parquet"),
        "no trace": (moe, prompts, out, "--replay", tmp_path / "none.parquet"),
        "foreign": (moe, prompts, out, "--replay", tmp_path / "foreign.parquet"),
        "in the way": (moe, prompts, tmp_path / "file"),
        "permission": (moe, prompts, locked / "out"),
    }


SAYS = {
    "dense": ["LlamaForCausalLM", "dense model", "expertmix convert"],
    "pickle": ["pickled weights", "pytorch_model.bin", "save_pretrained"],
    "no model": ["no model folder ./nothing", "default-moe"],
    "site": ["no site matches '*.layers.77.mlp'", "Near names: ", "expertmix models"],
    "expert number": ["model.layers.0.mlp#0", "experts 0 to 8, not 9"],
    "expert name": ["no expert named 'poetry'", "maths, backward"],
    "address": ["'poetry' is not SITE:EXPERT", '"*:python"'],
    "too many masked": ["Mask leaves 1 experts at model.layers.0.mlp#0", "use Ablate"],
    "empty": ["empty.txt holds no prompt"],
    "no prompts": ["there is no prompt file", "none.txt"],
    "long": ["long.txt:1", "129 tokens", "reads 128", "--truncate"],
    "key": ["key.jsonl:2", "unknown key 'txet'", "text, prompt, label"],
    "corrupt": ["cut.parquet", "record it again"],
    "no trace": ["there is no trace file", "none.parquet"],
    "foreign": ["recorded on", "this model is"],
    "in the way": ["file is a file", "name a folder"],
    "permission": ["cannot write", "out"],
}


@pytest.mark.parametrize("case", SAYS)
def test_bad_input_is_one_line_that_helps(expertmix, bad, case, tmp_path):
    """Exit code 2; what, where, what to do; nothing on stdout, nothing half-written."""
    before = everything(tmp_path)
    answer = _trace(expertmix, *bad[case])
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith("error: ")
    assert answer.err.count("\n") == 1
    for part in SAYS[case]:
        assert part in answer.err
    assert everything(tmp_path) == before


@pytest.mark.parametrize("case", sorted(SAYS.keys() - {"foreign", "in the way", "permission"}))
def test_a_dry_run_finds_it_too(expertmix, bad, case):
    """All but what needs the weights or the output folder."""
    answer = _trace(expertmix, *bad[case], "--dry-run")
    assert answer.code == 2
    assert all(part in answer.err for part in SAYS[case])
