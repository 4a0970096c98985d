from __future__ import annotations

import json

import pytest
from study.composing import ADAPTERS, save_base
from study.conftest import everything


def _compose(expertmix, base, library, prompts, *more: object):
    return expertmix(
        "compose", base, library, "--prompts", prompts, "--router", "spectr",
        "--max-new-tokens", 6, "--device", "cpu", *more,
    )  # fmt: skip


def test_answers_are_shown_with_the_shares_of_adapters(expertmix, base, library, asked, tmp_path):
    """Prompt by prompt; a legend, tables, and what was written; nothing on stderr."""
    answer = _compose(
        expertmix, base, library, asked, "--out", tmp_path / "out", "--against", "base"
    )
    assert (answer.code, answer.err) == (0, "")
    assert all(f"asked.jsonl:{n} (" in answer.out for n in range(1, 6))
    assert "one and two make three" in answer.out
    assert "Routers on the same texts" in answer.out
    assert all(f" {name} " in answer.out for name in ADAPTERS)
    for name in ("answers.jsonl", "trace.parquet", "results.json", "report.html"):
        assert f"wrote {tmp_path / 'out' / name}" in answer.out.replace("\n", "")


def test_json_is_all_there_is_on_stdout(expertmix, base, library, plain, tmp_path):
    """The content of results.json, and the answers with every token's adapters."""
    answer = _compose(expertmix, base, library, plain, "--json", "--out", tmp_path, "--no-report")
    assert (answer.code, answer.err) == (0, "")
    found = json.loads(answer.out)
    answers = found.pop("answers")
    assert found == json.loads((tmp_path / "results.json").read_text())
    assert not (tmp_path / "report.html").exists()
    assert [row["prompt"] for row in answers] == ["first prompt", "the second one", "third"]
    assert {"token", "adapter", "weights"} == set(answers[0]["tokens"][0])


def test_a_dry_run_writes_nothing(expertmix, base, library, asked, tmp_path):
    """It says what would be done."""
    before = everything(tmp_path)
    more = ("--dry-run", "--set", "top_k=1", "--against", "base", "--out", tmp_path / "out")
    answer = _compose(expertmix, base, library, asked, *more)
    assert answer.code == 0
    assert "LlamaForCausalLM with 3 adapters at 14 modules: ada, bob, cyd" in answer.out
    assert "router spectr top_k=1: SpectR(" in answer.out
    assert "5 prompts" in answer.out
    assert "then read under 2 routers" in answer.out
    plan = _compose(expertmix, base, library, asked, *more, "--json")
    assert json.loads(plan.out)["sites"] == 14
    assert everything(tmp_path) == before


def test_the_default_router_needs_no_setting(expertmix, base, library, plain):
    """Nor a results folder."""
    answer = expertmix(
        "compose", base, library, "--prompts", plain, "--max-new-tokens", 2, "--device", "cpu"
    )
    assert (answer.code, answer.err) == (0, "")


@pytest.fixture
def bad(base, library, foreign, asked, plain, locked, pickled, tmp_path):
    """Arguments of every kind of bad input, by name."""
    (tmp_path / "file").write_text("")
    (tmp_path / "none").mkdir()
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "long.txt").write_text("a" * 123)
    (tmp_path / "longer.txt").write_text("a" * 999)
    (tmp_path / "poetry.jsonl").write_text('{"text": "a", "label": "poetry"}')
    mute = save_base(tmp_path / "mute")
    return {
        "empty": (base, library, tmp_path / "empty.txt"),
        "no prompts": (base, library, tmp_path / "none.txt"),
        "router": (base, library, plain, "--against", "sectr"),
        "setting": (base, library, plain, "--set", "topk=2"),
        "value": (base, library, plain, "--set", "top_k=many"),
        "form": (base, library, plain, "--set", "top_k"),
        "rival's setting": (base, library, plain, "--against", "arrow score=energy"),
        "oracle": (base, library, plain, "--against", "oracle"),
        "label": (base, library, tmp_path / "poetry.jsonl", "--against", "oracle"),
        "fixed": (base, library, plain, "--against", "fixed weights=eve"),
        "twice": (base, library, plain, "--against", "base", "--against", "base"),
        "no library": (base, tmp_path / "nothing", plain),
        "no adapters": (base, tmp_path / "none", plain),
        "foreign": (base, foreign, plain),
        "no base": ("./nothing", library, plain),
        "pickle": (pickled, library, plain),
        "calibration": (base, library, plain, "--calibrate", tmp_path / "empty.txt"),
        "chat": (mute, library, plain, "--chat"),
        "long": (base, library, tmp_path / "long.txt"),
        "longer": (base, library, tmp_path / "longer.txt"),
        "many": (base, library, plain, "--set", "top_k=4"),
        "rival's many": (base, library, plain, "--against", "arrow top_k=9"),
        "in the way": (base, library, plain, "--out", tmp_path / "file"),
        "permission": (base, library, plain, "--out", locked / "out"),
    }


SAYS = {
    "empty": ["empty.txt holds no prompt"],
    "no prompts": ["there is no prompt file", "none.txt"],
    "router": ["no router 'sectr'", "did you mean 'spectr'?"],
    "setting": ["'spectr' has no setting 'topk'", "did you mean 'top_k'?"],
    "value": ["top_k must be a whole number", "'many'"],
    "form": ["'top_k' is not KEY=VALUE"],
    "rival's setting": ["'arrow' has no setting 'score'"],
    "oracle": ["the oracle is told", "label"],
    "label": ["poetry.jsonl:1", "'poetry'", "ada, bob, cyd"],
    "fixed": ["no adapter 'eve'", "ada, bob, cyd"],
    "twice": ["'base' is named twice"],
    "no library": ["nothing"],
    "no adapters": ["no adapter in"],
    "foreign": ["adapter 'eve'", "trained on another base"],
    "no base": ["no model folder ./nothing"],
    "pickle": ["pickled weights"],
    "calibration": ["empty.txt holds no prompt"],
    "chat": ["no chat template", "--chat"],
    "long": ["long.txt:1", "123 tokens", "128", "--max-new-tokens"],
    "longer": ["longer.txt:1", "999 tokens", "128", "--max-new-tokens"],
    "many": ["'spectr top_k=4'", "4 of 3 adapters", "lower top_k"],
    "rival's many": ["'arrow top_k=9'", "9 of 3 adapters"],
    "in the way": ["file is a file", "name a folder"],
    "permission": ["cannot write", "out"],
}


@pytest.mark.parametrize("case", SAYS)
def test_bad_input_is_one_line_that_helps(expertmix, bad, case, tmp_path):
    """Exit code 2; what, where, what to do; nothing on stdout, nothing half-written."""
    before = everything(tmp_path)
    answer = _compose(expertmix, *bad[case])
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith("error: ")
    assert answer.err.count("\n") == 1
    for part in SAYS[case]:
        assert part in answer.err
    assert everything(tmp_path) == before


@pytest.mark.parametrize("case", sorted(SAYS.keys() - {"in the way", "permission"}))
def test_a_dry_run_finds_it_too(expertmix, bad, case):
    """All but what needs the output folder: before any weights of the base are read."""
    answer = _compose(expertmix, *bad[case], "--dry-run")
    assert answer.code == 2
    assert all(part in answer.err for part in SAYS[case])


@pytest.mark.parametrize(
    "more", [("--temperature", "-1"), ("--combination", "sum"), ("--max-new-tokens", "0")]
)
def test_the_parser_refuses_what_cannot_be(expertmix, base, library, plain, more):
    """Exit code 2, before anything is opened."""
    assert _compose(expertmix, base, library, plain, *more).code == 2


def test_a_prompt_cannot_steer_the_terminal(expertmix, base, library, tmp_path):
    """Nor can a label: escape characters are shown, not sent."""
    row = {"text": "a \x1b[31mred\x1b]0;title\x07 one", "label": "b\x1b[2J"}
    (tmp_path / "asked.jsonl").write_text(json.dumps(row))
    answer = _compose(expertmix, base, library, tmp_path / "asked.jsonl", "--against", "base")
    assert answer.code == 0
    assert not set(answer.out) & {"\x1b", "\x07"}
    assert "[31mred" in answer.out
