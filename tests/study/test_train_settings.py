from __future__ import annotations

from pathlib import Path

import pytest

from expertmix.errors import ConfigError
from expertmix.study.train_settings import Data, TrainSettings, load_settings

from .training import config


def test_a_config_is_read_with_its_types(tmp_path: Path) -> None:
    """Numbers as YAML writes them badly, one file for a list, sections, defaults."""
    path = tmp_path / "a.yaml"
    path.write_text(
        "model: owner/model\ndata: {train: a.txt}\nout: run\nsteps: 5\nlearning_rate: 3e-4\n"
        "betas: [0.9, 0.99]\nlora: {rank: 4}\nclip: 1\n"
    )
    read = load_settings(path)
    assert (read.model, read.learning_rate, read.betas) == ("owner/model", 3e-4, (0.9, 0.99))
    assert read.data == Data(train=(tmp_path / "a.txt",))
    assert (read.lora.rank, read.lora.alpha, read.clip) == (4, 16.0, 1.0)
    assert read.out == tmp_path / "run"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lerning_rate": 1}, "unknown key lerning_rate: did you mean learning_rate"),
        ({"data": {"train": "a.txt", "colum": "x"}}, "unknown key data.colum: did you mean column"),
        ({"data": {}}, "data.train is missing"),
        ({"data": 3}, "data is a section of keys"),
        ({"steps": "many"}, "steps must be a whole number, got 'many'"),
        ({"steps": True}, "steps must be a whole number"),
        ({"batch_size": 2.5}, "batch_size must be a whole number"),
        ({"packing": "yes"}, "packing must be true or false"),
        ({"what": "router"}, "what: 'router' is unknown; give one of all, routers"),
        ({"betas": [0.9]}, "betas must be 2 values"),
        ({"betas": [0.9, 1.0]}, "must be in"),
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"epochs": 2}, "one of steps, epochs and tokens"),
        ({"steps": None}, "one of steps, epochs and tokens"),
        ({"batch_size": 6, "accumulation": 4}, "does not split into accumulation=4"),
        ({"learning_rate": 0}, "must be above 0"),
        ({"learning_rate": float("nan")}, "must be above 0"),
        ({"clip": -1}, "clip=-1.0 must be at least 0"),
        ({"data": {"train": "a.txt", "validation": 1.5}}, "a share in"),
        ({"report_to": "mlflow"}, "report_to"),
        ({"lora": {"rank": 0}}, "lora.rank=0"),
        ({"model": 7}, "model must be text or a section of keys"),
        ({"model": {"old": {}}}, "unknown key model.old: "),
    ],
)
def test_a_wrong_key_or_value_is_named(tmp_path: Path, changes: dict, said: str) -> None:
    """With the place, what it may be, and the nearest name; no file of texts is opened."""
    path = config(tmp_path, **changes)
    (tmp_path / "texts.txt").unlink()
    with pytest.raises(ConfigError, match=said.replace("(", r"\(")):
        load_settings(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("steps: 1\nsteps: 2\n", "line 2: 'steps' is given twice"),
        ("steps: [\n", "is not YAML"),
        ("- a\n", "holds no settings"),
        ("", "holds no settings"),
    ],
)
def test_what_is_no_config_is_refused(tmp_path: Path, text: str, said: str) -> None:
    """Also a key that stands twice, which YAML readers pass over."""
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        load_settings(path)
    with pytest.raises(ConfigError, match="there is no config"):
        load_settings(tmp_path / "b.yaml")


def test_settings_are_plain_data(tmp_path: Path) -> None:
    """What `to_dict` gives, YAML and JSON can hold."""
    found = load_settings(config(tmp_path)).to_dict()
    assert set(found) == set(TrainSettings.__dataclass_fields__)
    assert found["data"]["train"] == [str(tmp_path / "texts.txt")]
