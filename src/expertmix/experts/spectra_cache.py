"""Spectra kept on the disk beside their library: one small file per adapter.

A file is named after the hash of the adapter's modules, scales and factors, and holds only what was
computed from them: singular values and r × r matrices. So it can never belong to other weights,
adapters of the same content share it, adding an adapter writes one file, and two processes that
build at once write the same. A file that is broken or of another format counts as missing. Files
of adapters that are gone stay until `prune`. Loading gives the same bits as computing.

Knows no router and no model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from expertmix.core.partial import PartialFile, output_errors
from expertmix.experts.lora import Adapter
from expertmix.experts.spectra import Spectra, Spectrum, dtype_of

FOLDER = ".expertmix/spectra"
"""Inside a library."""
_FORMAT = "1"  # of the files, and of how signs and null directions are decided
_UNUSABLE = (
    OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError,
)  # fmt: skip
_HEADER = 8  # bytes in which safetensors says how long its header is
_KEY = "expertmix"
_FIELDS = ("singular", "reads", "writes")


@dataclass(frozen=True)
class SpectraCache:
    """A folder of spectra.

    Attributes:
        folder: It need not exist.
    """

    folder: Path

    @classmethod
    def beside(cls, home: Path) -> SpectraCache:
        """The one of a library."""
        return cls(home / FOLDER)

    def path(self, digest: str) -> Path:
        """Where the spectra of an adapter of that hash are, or would be."""
        return self.folder / f"{digest}.safetensors"

    def get(self, adapter: Adapter) -> Spectra | None:
        """Its spectra, or None where there are none that can be used."""
        try:
            path = self.path(adapter.digest)
            if not path.is_file():
                return None
            data = path.read_bytes()
            about = json.loads(_metadata(data)[_KEY])
            tensors = {name: value.clone() for name, value in load(data).items()}
            ranks = about["ranks"]
            if about["format"] != _FORMAT or about["sum"] != _sum(tensors, ranks):
                return None
            return _unpacked(adapter, ranks, tensors)
        except _UNUSABLE:
            return None

    def put(self, spectra: Spectra) -> None:
        """Keep spectra; the file is whole or absent.

        Raises:
            OutputError: The folder cannot be written.
        """
        tensors, ranks = _packed(spectra)
        about = {"format": _FORMAT, "sum": _sum(tensors, ranks), "ranks": ranks}
        file = PartialFile(self.path(spectra.digest))
        try:
            with file.writing():
                file.file.write(save(tensors, {_KEY: json.dumps(about)}))
            file.seal()
            file.publish()
        finally:
            file.discard()

    def prune(self, keep: Iterable[str]) -> int:
        """Delete the files of all adapters but those of these hashes; says how many.

        Raises:
            OutputError: The folder cannot be written.
        """
        wanted = {self.path(digest) for digest in keep}
        gone = [path for path in self.folder.glob("*.safetensors") if path not in wanted]
        for path in gone:
            with output_errors(path):
                path.unlink(missing_ok=True)
        return len(gone)


def _packed(spectra: Spectra) -> tuple[dict[str, Tensor], dict[str, list[Any]]]:
    """Tensors, and per rank of the factors the modules with their number of directions.

    Rows of all modules of one rank lie in one tensor: an adapter of two hundred modules then opens
    as fast as one of two.
    """
    members: dict[int, list[tuple[str, Spectrum]]] = {}
    for module, spectrum in spectra.modules.items():
        members.setdefault(spectrum.factors.down.shape[0], []).append((module, spectrum))
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, list[Any]] = {}
    for rank, found in members.items():
        every = [spectrum for _, spectrum in found]
        ranks[str(rank)] = [[module, spectrum.rank] for module, spectrum in found]
        columns = zip(*((one.singular, one.reads, one.writes) for one in every), strict=True)
        for name, rows in zip(_FIELDS, columns, strict=True):
            tensors[f"{rank}.{name}"] = torch.cat(rows).cpu()
    return tensors, ranks


def _unpacked(
    adapter: Adapter, ranks: Mapping[str, list[Any]], tensors: Mapping[str, Tensor]
) -> Spectra:
    """The inverse of `_packed`; an error of any kind where it does not fit the adapter."""
    found: dict[str, Spectrum] = {}
    for rank, members in ranks.items():
        names = [module for module, _ in members]
        counts = [int(count) for _, count in members]
        columns = [torch.split(tensors[f"{rank}.{name}"], counts) for name in _FIELDS]
        for module, singular, reads, writes in zip(names, *columns, strict=True):
            factors = adapter.factors[module]
            strengths = singular.to(factors.down.device, dtype_of(factors))
            found[module] = Spectrum(
                factors, strengths, reads.to(strengths.device), writes.to(strengths.device)
            )
    if found.keys() != adapter.factors.keys():
        raise ValueError("other modules")
    return Spectra(adapter, {module: found[module] for module in adapter.factors})


def _metadata(data: bytes) -> dict[str, str]:
    """Of a safetensors file in memory."""
    size = int.from_bytes(data[:_HEADER], "little")
    header = json.loads(data[_HEADER : _HEADER + size])
    found: dict[str, str] = header["__metadata__"]
    return found


def _sum(tensors: Mapping[str, Tensor], ranks: Mapping[str, list[Any]]) -> str:
    """Of all that a file holds, also of whose rows are whose."""
    digest = hashlib.sha256(json.dumps(ranks).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()
