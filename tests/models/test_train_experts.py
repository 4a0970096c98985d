from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from .conftest import load, tiny_tokenizer

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"

# PEFT and transformers warn about each other's renamings.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module("train_experts")


@pytest.fixture
def domains(script: ModuleType) -> ModuleType:
    if not (DATA / "README.md").is_file():
        pytest.skip("needs the project's data folder beside the checkout")
    return sys.modules["expert_data"]


def test_a_killed_run_goes_on_exactly(script: ModuleType, base: Path, tmp_path: Path) -> None:
    """A run stopped after a save and started again ends bit for bit like one that never stopped."""
    settings = script.Settings(rows=2, length=8, save_every=2)
    blocks = script.pack(["abc def " * 20], tiny_tokenizer(), 8, 0)
    ends = []
    for stops in ((4,), (2, 4)):
        file = tmp_path / f"{len(stops)}.pt"
        for steps in stops:
            run = script.Run(load(base), domain(script, 4), file, 0)
            train_until(script, run, blocks, settings, steps)
        ends.append(script.get_peft_model_state_dict(run.model))
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def domain(script: ModuleType, steps: int) -> object:
    return script.Domain("ada", 4, steps, "", "", lambda data: [], lambda data: [])


def train_until(
    script: ModuleType, run: object, blocks: torch.Tensor, settings: object, steps: int
) -> None:
    """Trains, and is killed right after the step that saves."""
    save = run.save

    def kill() -> None:
        save()
        if run.step == steps:
            raise KeyboardInterrupt

    run.save = kill
    with pytest.raises(KeyboardInterrupt):
        script.train(run, blocks, settings)


def test_no_expert_is_measured_on_what_any_expert_has_seen(domains: ModuleType) -> None:
    """Held-out texts share no text with any training split, and no gsm8k question with a twin."""
    trained = {text for domain in domains.DOMAINS for text in domain.train(DATA)}
    for domain in domains.DOMAINS:
        fresh = set(domain.heldout(DATA)) - trained
        assert len(fresh) > 0.95 * len(set(domain.heldout(DATA)))
    twins = {row["original_question"] for row in domains._backward_rows(DATA)[0]}
    maths = next(domain for domain in domains.DOMAINS if domain.name == "maths")
    for text in maths.heldout(DATA):
        assert text.partition("\nAnswer: ")[0].removeprefix("Question: ") not in twins
