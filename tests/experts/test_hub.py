"""Hub ids without any hub: its cache is laid out by hand, as huggingface_hub has it."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import pytest
from huggingface_hub.errors import HfHubHTTPError

from expertmix.errors import CheckpointError
from expertmix.experts.hub import is_hub_id
from expertmix.experts.peft_folder import find_adapters
from expertmix.experts.shelf import Shelf

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an empty hub cache; tests have no network."""
    folder = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return folder


def repository(hub: Path, name: str) -> Path:
    """An empty snapshot of a repository."""
    root = hub / f"models--{name.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(REVISION)
    snapshot = root / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    return snapshot


def test_an_adapter_from_the_hub_is_the_one_that_was_put_there(library, hub):
    """By id; named after its repository; alone or in a list with folders."""
    shutil.copytree(library / "ada", repository(hub, "alice/sql"), dirs_exist_ok=True)
    shelf = Shelf.open("alice/sql")
    assert shelf.names == ("sql",)
    assert shelf.adapters[0].digest == Shelf.open(library / "ada").adapters[0].digest
    assert Shelf.open([library / "bob", "alice/sql"]).names == ("bob", "sql")


def test_repositories_of_one_name_are_told_apart(library, hub):
    """Two owners, one name: the whole id is the name."""
    for owner, name in (("alice", "ada"), ("bob", "bob")):
        shutil.copytree(library / name, repository(hub, f"{owner}/sql"), dirs_exist_ok=True)
    assert Shelf.open(["alice/sql", "bob/sql"]).names == ("alice/sql", "bob/sql")


def test_a_repository_may_hold_many_adapters(library, hub):
    """Folders at its top, each an adapter; spectra are kept in the repository's own folder."""
    snapshot = repository(hub, "alice/many")
    for name in ("ada", "bob"):
        shutil.copytree(library / name, snapshot / name)
    assert Shelf.open("alice/many", cache=True).names == ("ada", "bob")
    kept = hub / "models--alice--many" / ".expertmix" / "spectra"
    assert len(list(kept.iterdir())) == 2
    assert {path.name for path in snapshot.iterdir()} == {"ada", "bob"}


def test_what_cannot_be_fetched_is_told(hub, tmp_path):
    """Unknown and no network; no adapter in it; half an adapter; no id at all."""
    with pytest.raises(CheckpointError, match=r"nobody/none is not a folder and cannot be fetched"):
        Shelf.open("nobody/none")
    with pytest.raises(CheckpointError, match=r"cannot be fetched.*"):
        Shelf.open("owner/bad..name")
    repository(hub, "alice/empty")
    with pytest.raises(CheckpointError, match="no adapter in"):
        Shelf.open("alice/empty")
    (repository(hub, "alice/half") / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(CheckpointError, match=r"'half' needs adapter_model.safetensors"):
        Shelf.open("alice/half")
    for name in ("./none/there", "nothing", str(tmp_path / "none")):
        with pytest.raises(CheckpointError, match="not a folder"):
            find_adapters(name)


def test_a_broken_network_is_told(hub, monkeypatch):
    """Whatever the hub's client raises becomes a typed error with its first line."""

    def broken(*args: object, **kwargs: object) -> None:
        raise HfHubHTTPError.__mro__[1]("the proxy says no\nin many words")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", broken)
    with pytest.raises(CheckpointError, match=r"fetched from the hub: the proxy says no\. Give"):
        Shelf.open("alice/sql")


def test_a_folder_is_never_taken_for_an_id(library, tmp_path, monkeypatch):
    """`adapters/python` is a folder where there is one; a path object always is one."""
    shutil.copytree(library / "ada", tmp_path / "adapters" / "python")
    monkeypatch.chdir(tmp_path)
    assert not is_hub_id("adapters/python")
    assert is_hub_id("adapters/perl")
    assert not is_hub_id(Path("adapters/perl"))
    assert Shelf.open("adapters/python").names == ("python",)
