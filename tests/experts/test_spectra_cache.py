from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from expertmix.experts import shelf as shelf_file
from expertmix.experts.peft_folder import read_adapter
from expertmix.experts.shelf import Shelf
from expertmix.experts.spectra import decompose_adapter
from expertmix.experts.spectra_cache import FOLDER, SpectraCache

from .world import random_adapter, zero


@pytest.fixture
def own(library: Path, tmp_path: Path) -> Path:
    """A library of one's own."""
    return Path(shutil.copytree(library, tmp_path / "own"))


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of adapters that were decomposed."""
    names: list[str] = []
    real = shelf_file.decompose_adapters

    def counting(adapters):
        names.extend(adapter.name for adapter in adapters)
        return real(adapters)

    monkeypatch.setattr(shelf_file, "decompose_adapters", counting)
    return names


def files(library: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (library / FOLDER).iterdir()}


def same(left: Shelf, right: Shelf) -> bool:
    """Bit for bit, in all that can be asked for."""
    assert left.names == right.names
    return all(
        torch.equal(getattr(one, name), getattr(other.modules[module], name))
        for mine, other in zip(left, right, strict=True)
        for module, one in mine.modules.items()
        for name in ("singular", "left", "right", "reads", "writes")
    )


def retrain(folder: Path, factor: float) -> None:
    """Other weights under the same name, of the same size and time of change."""
    path = folder / "adapter_model.safetensors"
    stat = path.stat()
    tensors = {key: factor * value for key, value in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size


def test_cached_is_uncached_bit_for_bit(own, computed):
    """Spectra from the disk are those that are computed; the second time none is computed."""
    plain = Shelf.open(own)
    first = Shelf.open(own, cache=True)
    computed.clear()
    second = Shelf.open(own, cache=True)
    assert computed == []
    assert same(plain, first)
    assert same(plain, second)
    assert [one.digest for one in plain] == [one.digest for one in second]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_every_type_comes_back(tmp_path, dtype):
    """Spectra of any type of factor, mixed ranks, and an adapter that does nothing."""
    cache = SpectraCache(tmp_path)
    for adapter in (
        random_adapter("a", 1, ["x", "y"], rank=3, dtype=dtype),
        zero(random_adapter("b", 2, dtype=dtype)),
    ):
        spectra = decompose_adapter(adapter)
        cache.put(spectra)
        found = cache.get(adapter)
        assert found is not None
        assert same(Shelf((spectra,)), Shelf((found,)))
        assert [one.singular.dtype for one in found.modules.values()] == [
            one.singular.dtype for one in spectra.modules.values()
        ]


def test_only_what_changed_is_computed_and_written(own, computed):
    """One adapter retrained: one is computed, one file is added, the others are untouched."""
    Shelf.open(own, cache=True)
    before = files(own)
    assert len(before) == 5
    computed.clear()
    retrain(own / "bob", 2.0)
    again = Shelf.open(own, cache=True)
    assert computed == ["bob"]
    assert same(again, Shelf.open(own))
    after = files(own)
    assert len(after) == 6
    assert before.items() <= after.items()


def test_the_scale_belongs_to_the_key(own, computed):
    """Another alpha in the config, the same weights: other spectra."""
    Shelf.open(own, cache=True)
    computed.clear()
    path = own / "ada" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 5}))
    assert same(Shelf.open(own, cache=True), Shelf.open(own))
    assert computed[0] == "ada"


def test_a_renamed_adapter_keeps_its_spectra(own, computed):
    """The name is no part of the key."""
    Shelf.open(own, cache=True)
    computed.clear()
    (own / "ada").rename(own / "zoe")
    assert "zoe" in Shelf.open(own, cache=True).names
    assert computed == []


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "other format", "text", "folder"])
def test_a_broken_file_is_built_anew(own, computed, damage):
    """Empty, truncated, damaged, of another version, no safetensors: computed, never an error."""
    Shelf.open(own, cache=True)
    digest = read_adapter(own / "ada").digest
    path = SpectraCache.beside(own).path(digest)
    whole = path.read_bytes()
    content = {
        "empty": b"",
        "cut": whole[:-5],
        "flipped": whole[:-5] + bytes([whole[-5] ^ 64]) + whole[-4:],
        "other format": whole.replace(b'\\"format\\": \\"1\\"', b'\\"format\\": \\"0\\"'),
        "text": b"hello, this is no safetensors file",
        "folder": None,
    }[damage]
    assert content != whole
    path.unlink()
    path.mkdir() if content is None else path.write_bytes(content)
    computed.clear()
    assert same(Shelf.open(own, cache=True), Shelf.open(own))
    assert computed[0] == "ada"
    assert content is None or path.read_bytes() == whole


def test_a_file_under_the_wrong_name_is_not_used(own, computed):
    """The spectra of another adapter in the place of ours are refused by their modules or sizes."""
    Shelf.open(own, cache=True)
    cache = SpectraCache.beside(own)
    ours, other = (cache.path(read_adapter(own / name).digest) for name in ("ada", "bob"))
    ours.write_bytes(other.read_bytes())
    computed.clear()
    assert same(Shelf.open(own, cache=True), Shelf.open(own))
    assert computed[0] == "ada"


def test_a_library_that_cannot_be_written_works(own, monkeypatch):
    """The shelf is built all the same, and the progress callback is told why."""
    (own / ".expertmix").write_text("a file in the way")
    said: list[str] = []
    shelf = Shelf.open(own, cache=True, progress=lambda stage, done, total: said.append(stage))
    assert same(shelf, Shelf.open(own))
    assert any("spectra are not kept: cannot write" in line for line in said)


def test_a_lone_adapter_is_kept_beside_it_and_a_given_folder_wins(own, tmp_path):
    """One adapter, or a list: in the parent of each; or wherever the caller says."""
    Shelf.open(own / "ada", cache=True)
    assert len(files(own)) == 1
    Shelf.open([own / "bob", own / "dee"], cache=True)
    assert len(files(own)) == 3
    Shelf.open(own, cache=tmp_path / "elsewhere")
    assert len(list((tmp_path / "elsewhere").iterdir())) == 5
    assert len(files(own)) == 3


def test_pruning_deletes_what_is_gone_and_nothing_else(own):
    """Opening deletes nothing; `prune` keeps the files that are named."""
    shelf = Shelf.open(own, cache=True)
    (own / FOLDER / "notes.txt").write_text("mine")
    rest = shelf.minus("ada")
    cache = SpectraCache.beside(own)
    assert cache.prune(one.digest for one in rest) == 1
    assert cache.prune(one.digest for one in rest) == 0
    assert cache.get(read_adapter(own / "ada")) is None
    assert cache.get(read_adapter(own / "bob")) is not None
    assert (own / FOLDER / "notes.txt").exists()


def test_no_half_written_file_is_left(own):
    """After building only whole files lie there."""
    Shelf.open(own, cache=True)
    assert all(path.suffix == ".safetensors" for path in (own / FOLDER).iterdir())


def test_many_may_build_at_once(own):
    """Eight at the same time: equal shelves, one file per adapter, nothing left beside them."""
    with ThreadPoolExecutor(8) as pool:
        shelves = list(pool.map(lambda _: Shelf.open(own, cache=True), range(8)))
    assert all(same(shelves[0], shelf) for shelf in shelves)
    assert len(files(own)) == 5
    assert same(Shelf.open(own, cache=True), shelves[0])


def test_rows_under_the_wrong_module_are_not_used(own, computed):
    """The sum is also of which rows are whose: two names that change places are seen."""
    shelf = Shelf.open(own, cache=True)
    path = SpectraCache.beside(own).path(shelf.adapters[0].digest)
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    about = json.loads(header["__metadata__"]["expertmix"])
    rows = next(iter(about["ranks"].values()))
    rows[0][0], rows[1][0] = rows[1][0], rows[0][0]
    header["__metadata__"]["expertmix"] = json.dumps(about)
    new = json.dumps(header).encode()
    path.write_bytes(len(new).to_bytes(8, "little") + new + data[8 + size :])
    computed.clear()
    assert same(Shelf.open(own, cache=True), shelf)
    assert computed == [shelf.adapters[0].name]


def test_what_is_no_file_is_not_waited_for(own):
    """A pipe in the place of a file is replaced, never read."""
    shelf = Shelf.open(own, cache=True)
    path = SpectraCache.beside(own).path(shelf.adapters[0].digest)
    path.unlink()
    os.mkfifo(path)
    assert same(Shelf.open(own, cache=True), shelf)
    assert path.is_file()
