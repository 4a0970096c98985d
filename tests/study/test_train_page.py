"""docs/train.md tells the truth."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from expertmix.study.train_job import run_train
from expertmix.study.train_settings import TrainSettings, load_settings

from .training import write_texts

PAGE = Path(__file__).parents[2] / "docs" / "train.md"


def test_the_config_on_the_page_works(tmp_path: Path) -> None:
    """On a text file beside it, as it stands."""
    found = re.search(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert found
    (tmp_path / "first.yaml").write_text(found[1])
    write_texts(tmp_path, count=300)
    done = run_train(load_settings(tmp_path / "first.yaml"))
    assert done.saved == tmp_path / "runs/first/model"
    assert done.figures["eval_loss"] < 4


def test_every_key_is_on_the_page() -> None:
    """In its table."""
    rows = "".join(re.findall(r"^\| `.*?\|", PAGE.read_text(), re.MULTILINE))
    assert {f"`{one.name}`" for one in fields(TrainSettings)} - {"`data`"} <= set(
        re.findall(r"`\w+`", rows)
    )
