"""Two processes on the processor (gloo), as torchrun starts them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from expertmix.errors import ConfigError
from expertmix.study.train_metrics import read_metrics
from expertmix.study.train_plan import plan_train

from .training import config, settings, trained

CODE = "import sys; sys.argv = ['expertmix', 'train', sys.argv[1]]\n"
CODE += "from expertmix.cli import main; main()"


def in_two_processes(path: Path) -> str:
    """What the first one says; the environment is the one that torchrun makes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    runs = []
    for rank in range(2):
        ours = {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
        ours |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_WORLD_SIZE": "2"}
        runs.append(
            subprocess.Popen(
                [sys.executable, "-c", CODE, str(path)],
                env={**os.environ, **ours}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                text=True,
            )
        )  # fmt: skip
    said = [run.communicate(timeout=300) for run in runs]
    assert all(run.returncode == 0 for run in runs), said[0][1]
    assert said[1][0] == "", "only the first process speaks"
    return said[0][0]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp", "experts"])
def test_two_processes_have_the_loss_of_one(tmp_path: Path, parallel: str) -> None:
    """All weights in each, a part, and of the experts only half: the same losses and routes."""
    one = trained(tmp_path, "one", steps=4)
    said = in_two_processes(config(tmp_path, "two", steps=4, parallel=parallel))
    assert f"wrote {tmp_path / 'two' / 'model'}" in said
    lines = [read_metrics(folder / "metrics.jsonl") for folder in (one.folder, tmp_path / "two")]
    for mine, theirs in zip(*lines, strict=True):
        assert mine.keys() == theirs.keys()
        for key in ("loss", "eval_loss", "aux_loss", "grad_norm"):
            if key in mine:
                assert theirs[key] == pytest.approx(mine[key], rel=2e-3)
    first, other = (one[0]["routing"] for one in lines)
    assert [site["load"] for site in first] == [site["load"] for site in other]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch_size": 3}, "does not split into 2 processes"),
        ({"parallel": "fsdp", "save_every": 2}, "cannot go on with such a run"),
        ({"parallel": "experts", "what": "lora"}, "trains no adapters"),
    ],
)
def test_what_processes_cannot_do_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict, said: str
) -> None:
    """Before they meet."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=said):
        plan_train(settings(tmp_path, **changes))
