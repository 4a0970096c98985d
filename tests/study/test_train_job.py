"""Laws of a whole run, on chains and mixtures of a few thousand parameters."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

from expertmix.errors import (
    CheckpointError,
    ConfigError,
    ContextLengthError,
    MissingDependencyError,
    ModelError,
    NoSitesError,
    OutputError,
)
from expertmix.study.train_job import run_train
from expertmix.study.train_metrics import read_metrics
from expertmix.study.train_plan import plan_train

from .training import COE, OLMOE, config, settings, trained, write_texts

# PEFT and transformers warn about each other's renamings.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*peft.*:UserWarning")


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def changed(one: Path, other: Path) -> set[str]:
    a, b = weights(one), weights(other)
    return {key for key in a if not torch.equal(a[key], b[key])}


def figures(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run without what depends on the clock."""
    lines = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a chain and a mixture were trained, in one go."""
    folder = tmp_path_factory.mktemp("training")
    trained(folder, "coe", save_every=2)
    trained(folder, "olmoe", model={"new": OLMOE}, save_every=2)
    return folder


@pytest.fixture
def copy(home: Path, tmp_path: Path) -> Path:
    """Its copy, to do harm to."""
    return Path(shutil.copytree(home, tmp_path / "copy"))


def killed(path: Path, lines: int) -> None:
    """Run a config in a process of its own, and kill it once so many lines are written."""
    code = "import sys; sys.argv = ['expertmix', 'train', sys.argv[1]]\n"
    code += "from expertmix.cli import main; main()"
    run = subprocess.Popen([sys.executable, "-c", code, str(path)], stderr=subprocess.DEVNULL)
    metrics = path.with_suffix("") / "metrics.jsonl"
    end = time.monotonic() + 120
    while len(read_metrics(metrics)) < lines and run.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL, "it ended before it was killed"


@pytest.mark.parametrize(("lines", "what"), [(5, {"new": COE}), (8, {"new": OLMOE})])
def test_a_killed_run_ends_like_one_that_was_not(tmp_path: Path, lines: int, what: Any) -> None:
    """After kill -9 at any step, the same command ends with the same bits and the same figures."""
    changes = {"model": what, "steps": 40, "save_every": 3, "eval_every": 4, "accumulation": 2}
    whole = trained(tmp_path, "whole", **changes)
    path = config(tmp_path, "cut", **changes)
    killed(path, lines)
    done = run_train(settings(tmp_path, "cut", **changes))
    assert not done.again
    assert same(done.saved, whole.saved)
    assert figures(done.folder) == figures(whole.folder)


@pytest.mark.parametrize("step", [0, 2, 4])
def test_a_run_goes_on_exactly_from_each_checkpoint(copy: Path, step: int) -> None:
    """Also from none at all; the finished model is the one of the uninterrupted run."""
    for other in (2, 4, 6):
        if other > step:
            shutil.rmtree(copy / f"coe/checkpoint-{other}", ignore_errors=True)
    before = figures(copy / "coe")
    shutil.move(copy / "coe/model", copy / "first")
    (copy / "coe/summary.json").unlink()
    had = any((copy / "coe").glob("checkpoint-*"))
    done = trained(copy, "coe", save_every=2)
    assert done.figures["resumed_from"] == (step if had else None)
    assert same(done.saved, copy / "first")
    assert figures(done.folder) == before


@pytest.mark.parametrize(
    "new",
    [
        {**COE, "tie_word_embeddings": True},
        {**COE, "attention_dropout": 0.3},
        {**COE, "router_bias": True, "gating": "shared"},
        {
            **OLMOE,
            "type": "mixtral",
            "num_local_experts": 4,
            "num_experts": None,
            "num_key_value_heads": 2,
        },
    ],
)
def test_every_kind_of_state_is_resumed(tmp_path: Path, new: dict[str, Any]) -> None:
    """Tied weights, the state of the dice, biases, experts that are stored one by one."""
    model = {"new": {key: value for key, value in new.items() if value is not None}}
    done = trained(tmp_path, model=model, save_every=4, eval_every=2)
    first = shutil.move(done.saved, tmp_path / "first")
    (done.folder / "summary.json").unlink()
    again = trained(tmp_path, model=model, save_every=4, eval_every=2)
    assert again.figures["resumed_from"] == 4
    assert same(again.saved, Path(first))


def test_two_runs_of_one_config_are_the_same(home: Path, tmp_path: Path) -> None:
    """Bit for bit, weights and figures."""
    again = trained(tmp_path, "coe", save_every=2)
    assert same(again.saved, home / "coe/model")
    assert figures(again.folder) == figures(home / "coe")


def test_how_a_step_is_cut_up_changes_no_loss(home: Path, tmp_path: Path) -> None:
    """Micro-batches are parts of the same batch, and the routers' losses weigh the same."""
    cut = trained(tmp_path, "coe", save_every=2, accumulation=4)
    for one, other in zip(figures(cut.folder), figures(home / "coe"), strict=True):
        for key in ("loss", "eval_loss"):
            if key in other:
                assert one[key] == pytest.approx(other[key], rel=1e-3)


def test_a_finished_run_is_not_redone(copy: Path) -> None:
    """Nothing is written; with `restart` it is trained anew, to the same end."""
    stamp = (copy / "coe/model/model.safetensors").stat().st_mtime_ns
    done = trained(copy, "coe", save_every=2)
    assert done.again
    assert (copy / "coe/model/model.safetensors").stat().st_mtime_ns == stamp
    first = shutil.copytree(copy / "coe/model", copy / "first")
    done = run_train(settings(copy, "coe", save_every=2), restart=True)
    assert not done.again
    assert same(done.saved, first)


def test_other_settings_do_not_go_on_with_a_run(copy: Path) -> None:
    """The key is named; what changes no outcome may change; texts count by their content."""
    with pytest.raises(ConfigError, match=r"learning_rate was 0\.01, is 0\.02"):
        trained(copy, "coe", save_every=2, learning_rate=0.02)
    assert trained(copy, "coe", save_every=3, keep=1).again
    write_texts(copy, seed=1)
    with pytest.raises(ConfigError, match="files was"):
        trained(copy, "coe", save_every=2)


def test_a_corrupt_checkpoint_is_skipped(copy: Path) -> None:
    """With a notice; the run goes on from the one before, to the same end."""
    first = shutil.move(copy / "coe/model", copy / "first")
    (copy / "coe/summary.json").unlink()
    (copy / "coe/checkpoint-6/model.safetensors").write_bytes(b"nothing")
    done = trained(copy, "coe", save_every=2)
    assert done.figures["resumed_from"] == 4
    assert done.figures["notices"] == ["checkpoint-6 was skipped: model.safetensors is corrupt"]
    assert same(done.saved, Path(first))


def test_the_data_are_in_the_same_order_for_every_model(tmp_path: Path) -> None:
    """Arms of a comparison see the same blocks, whatever the model."""
    write_texts(tmp_path)
    seen = []
    for model in (COE, OLMOE, {**COE, "num_iterations": 1, "hidden_size": 8}):
        plan = plan_train(settings(tmp_path, "run", model={"new": model}))
        seen.append(plan.identity()["blocks"])
    assert len(set(seen)) == 1
    other = plan_train(settings(tmp_path, "run", seed=1))
    assert other.identity()["blocks"] != seen[0]


@pytest.mark.parametrize(
    ("source", "what", "part"),
    [
        ("coe", "routers", ".gate.weight"),
        ("olmoe", "routers", ".gate.weight"),
        ("coe", "experts", ".experts."),
        ("olmoe", "experts", ".experts."),
    ],
)
def test_only_the_part_that_is_asked_for_learns(
    home: Path, copy: Path, source: str, what: str, part: str
) -> None:
    """All of it does; nothing else has changed by a bit, weight decay or not."""
    done = trained(copy, f"{source}-{what}", model=f"{source}/model", what=what, weight_decay=0.1)
    moved = changed(home / source / "model", done.saved)
    assert moved == {key for key in weights(done.saved) if part in key}
    assert done.figures["trainable"] < done.figures["parameters"]


def test_scales_learn_with_the_routers(tmp_path: Path) -> None:
    """Where there are scales; a model without them says so."""
    begun = trained(tmp_path, "begun", model={"new": {**COE, "iteration_scale": True}}, steps=1)
    done = trained(tmp_path, "scales", model="begun/model", what="routers_and_scales")
    moved = changed(begun.saved, done.saved)
    assert {key.rpartition(".")[2] for key in moved} == {"weight", "scale"}
    assert all(key.endswith((".gate.weight", ".scale")) for key in moved)
    with pytest.raises(ConfigError, match="has no scales of iterations"):
        trained(tmp_path, "none", what="routers_and_scales")


def test_adapters_leave_their_base_untouched(copy: Path) -> None:
    """Only the adapter is written; it changes what the base says; and it resumes exactly."""
    before = (copy / "coe/model/model.safetensors").read_bytes()
    changes = {"model": "coe/model", "what": "lora", "lora": {"rank": 2}, "save_every": 3}
    done = trained(copy, "lora", **changes)
    assert (copy / "coe/model/model.safetensors").read_bytes() == before
    tensors = load_file(done.saved / "adapter_model.safetensors")
    assert tensors
    assert all(".lora_A." in key or ".lora_B." in key for key in tensors)
    assert any(".lora_B." in key and bool(value.any()) for key, value in tensors.items())
    shutil.rmtree(done.saved)
    shutil.rmtree(done.folder / "checkpoint-6")
    (done.folder / "summary.json").unlink()
    again = trained(copy, "lora", **changes)
    assert again.figures["resumed_from"] == 3
    found = load_file(again.saved / "adapter_model.safetensors")
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)


def test_a_loss_that_is_no_number_stops_the_run(copy: Path) -> None:
    """Step and module are named; the last good checkpoint stays and holds finite weights only."""
    path = copy / "broken"
    shutil.copytree(copy / "coe/model", path)
    model = AutoModelForCausalLM.from_pretrained(path)
    model.model.layers[1].mlp.experts.gate_up_proj.data[:] = 3e38
    model.save_pretrained(path)
    with pytest.raises(
        ModelError, match=r"step 1: the loss is nan.*model\.layers\.1\.mlp\.experts"
    ):
        trained(copy, "nan", model="broken")
    assert not list((copy / "nan").glob("checkpoint-*"))


def test_a_run_that_diverges_keeps_its_last_good_checkpoint(tmp_path: Path) -> None:
    """A huge learning rate: the step is told, no checkpoint holds what is not finite."""
    with pytest.raises(ModelError, match=r"stopped at step (\d+): .*checkpoint-\d+ is good"):
        trained(tmp_path, learning_rate=1e30, clip=0, warmup=3, steps=30, save_every=1)
    for folder in (tmp_path / "run").glob("checkpoint-*"):
        assert all(bool(torch.isfinite(one).all()) for one in weights(folder).values())


def test_a_full_disk_leaves_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The unfinished one is removed, the error says so, and the same command goes on from there."""
    real = Trainer._save_optimizer_and_scheduler

    def full(self: Trainer, folder: str) -> None:
        if self.state.global_step == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(self, folder)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_optimizer_and_scheduler", full)
        with pytest.raises(OutputError, match=r"checkpoint-4: the disk is full.*-2 is whole"):
            trained(tmp_path, save_every=2, keep=1)
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    done = trained(tmp_path, save_every=2, keep=1)
    assert done.figures["resumed_from"] == 2
    assert same(done.saved, trained(tmp_path, "whole").saved)


def test_the_folder_tells_all(home: Path) -> None:
    """Lines, lock, summary; the model opens and generates with the tokenizer beside it."""
    out = home / "coe"
    lines = figures(out)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 6]
    assert set(lines[0]) == {
        "step", "epoch", "tokens", "loss", "aux_loss", "learning_rate", "grad_norm", "routing",
    }  # fmt: skip
    assert [site["site"] for site in lines[0]["routing"]] == [
        f"model.layers.{layer}.mlp#{number}" for layer in range(2) for number in range(2)
    ]
    lock = yaml.safe_load((out / "train.lock.yaml").read_text())
    assert lock["settings"]["seed"] == 0
    assert "torch" in lock["versions"]
    assert len(lock["identity"]["files"]["texts.txt"]) == 64
    summary = json.loads((out / "summary.json").read_text())
    assert summary["eval_loss"] == pytest.approx(lines[-1]["eval_loss"], abs=1e-4)
    assert sorted(path.name for path in out.glob("checkpoint-*")) == [
        "checkpoint-4",
        "checkpoint-6",
    ]
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    ids = tokenizer("the river", return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0]) == "the river"
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]
    assert model.config.use_cache


def test_the_loss_goes_down(tmp_path: Path) -> None:
    """It learns; in bfloat16, too, with weights in float32; padded, too."""
    for name, changes in (("bf16", {"precision": "bf16"}), ("padded", {"packing": False})):
        done = trained(tmp_path, name, steps=30, learning_rate=0.02, **changes)
        losses = [line["loss"] for line in figures(done.folder) if "loss" in line]
        assert losses[-1] < losses[0] - 0.5
        assert all(one.dtype == torch.float32 for one in weights(done.saved).values())


def test_biases_learn_without_a_gradient(tmp_path: Path) -> None:
    """They are saved with the model; all have moved by whole steps of their rate."""
    new = {**COE, "router_bias": True}
    done = trained(tmp_path, model={"new": new}, bias_rate=0.5, save_every=3)
    biases = [v for k, v in weights(done.saved).items() if k.endswith("correction_bias")]
    assert len(biases) == 4
    assert all(bool((one * 2 == (one * 2).round()).all()) for one in biases)
    assert any(bool(one.any()) for one in biases)


def test_how_long_can_be_said_in_three_ways(tmp_path: Path) -> None:
    """Steps, tokens, or passes over the data."""
    write_texts(tmp_path)
    blocks = len(plan_train(settings(tmp_path)).training)
    assert plan_train(settings(tmp_path, steps=None, tokens=16 * 4 * 5 + 3)).steps == 5
    assert plan_train(settings(tmp_path, steps=None, epochs=2)).steps == 2 * blocks // 4


def test_validation_texts_that_were_trained_on_are_told(tmp_path: Path) -> None:
    """As a notice, with an example."""
    write_texts(tmp_path)
    shutil.copy(tmp_path / "texts.txt", tmp_path / "same.txt")
    plan = plan_train(settings(tmp_path, data={"train": "texts.txt", "validation": ["same.txt"]}))
    assert "60 of 60 validation texts are in the training texts, too" in plan.notices[0]


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"sequence_length": 65}, ContextLengthError, "more than the 64 tokens"),
        ({"data": {"train": "none.txt"}}, ConfigError, "there is no file"),
        ({"model": "./none"}, CheckpointError, "there is no model folder"),
        ({"model": {"new": {**COE, "type": "coo"}}}, ConfigError, "knows no type 'coo'"),
        ({"model": {"new": {**COE, "num_expert": 3}}}, ConfigError, "did you mean num_experts"),
        ({"model": {"new": {**COE, "hidden_size": "x"}}}, ConfigError, "hidden_size"),
        ({"model": {"new": {**COE, "num_experts_per_tok": 9}}}, ConfigError, "is more than"),
        ({"model": {"new": {**COE, "vocab_size": 99}}}, ConfigError, "give a number from 257 on"),
        ({"model": {"new": {"type": "coe"}}}, ConfigError, "model.new.tokenizer is missing"),
        ({"what": "experts", "model": {"new": {
            "type": "llama", "tokenizer": "own", "vocab_size": 260, "hidden_size": 16,
            "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
        }}}, NoSitesError, "dense model"),
        ({"what": "lora", "lora": {"targets": ["none"]}}, ConfigError, "lora.targets"),
        ({"report_to": "wandb"}, MissingDependencyError, "pip install wandb"),
        ({"parallel": "fsdp"}, ConfigError, "start them with torchrun"),
        ({"experts_implementation": "fast"}, ConfigError, "experts_implementation='fast'"),
        ({"data": {"train": "texts.txt"}, "packing": True, "sequence_length": 60,
          "steps": None, "epochs": 0.0}, ConfigError, "epochs"),
    ],
)  # fmt: skip
def test_bad_input_is_told_before_anything_is_written(
    tmp_path: Path, changes: Any, error: type[Exception], said: str
) -> None:
    """What is wrong, and where."""
    with pytest.raises(error, match=said):
        trained(tmp_path, **changes)
    assert not (tmp_path / "run/model").exists()
    assert not list((tmp_path / "run").glob("checkpoint-*"))
