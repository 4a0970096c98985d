from __future__ import annotations

import json

import pytest
from study.conftest import everything
from study.training import config

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*peft.*:UserWarning")


def test_a_run_shows_its_figures_and_what_comes_next(expertmix, tmp_path):
    """Lines while it trains on stderr, results on stdout; the second time nothing is done."""
    path = config(tmp_path, eval_every=3)
    answer = expertmix("train", path)
    assert answer.code == 0, answer.err
    lines = answer.err.splitlines()
    assert len([line for line in lines if "tokens/s" in line and "busiest expert" in line]) == 6
    assert len([line for line in lines if "validation loss" in line]) == 2
    assert f"wrote {tmp_path / 'run' / 'model'}" in answer.out
    assert "next: expertmix" in answer.out
    again = expertmix("train", path)
    assert again.code == 0
    assert "is finished; --restart trains it anew" in again.out
    assert "step" not in again.err


def test_a_dry_run_writes_nothing(expertmix, tmp_path):
    """It says what would be trained."""
    path = config(tmp_path)
    before = everything(tmp_path)
    answer = expertmix("train", path, "--dry-run")
    assert answer.code == 0, answer.err
    assert "CoeForCausalLM" in answer.out
    assert "would train 6 steps" in answer.out
    found = json.loads(expertmix("train", path, "--dry-run", "--json").out)
    assert found["tokens"] == 6 * 4 * 16
    assert everything(tmp_path) == before


def test_json_is_one_document(expertmix, tmp_path):
    """On stdout; nothing on stderr."""
    answer = expertmix("train", config(tmp_path), "--json")
    assert (answer.code, answer.err) == (0, "")
    found = json.loads(answer.out)
    assert found["command"] == "train"
    assert found == json.loads((tmp_path / "run/summary.json").read_text())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lerning_rate": 1}, "error: unknown key lerning_rate: did you mean learning_rate?"),
        ({"data": {"train": "none.jsonl"}}, "error: there is no file"),
        ({"report_to": "trackio"}, "pip install trackio"),
    ],
)
def test_bad_input_is_one_line(expertmix, tmp_path, changes, said):
    """With exit code 2."""
    answer = expertmix("train", config(tmp_path, **changes))
    assert (answer.code, answer.out) == (2, "")
    assert said in answer.err
    assert answer.err.count("\n") == 1
