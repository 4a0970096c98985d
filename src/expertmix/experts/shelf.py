"""A shelf: adapters of one base model in a fixed order, each with its spectra.

Frozen: adding, removing and replacing give a new shelf, which keeps the spectra of every adapter
whose hash did not change. Knows no model; `composed` puts a shelf on one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from expertmix.errors import CheckpointError
from expertmix.experts.lora import Adapter
from expertmix.experts.peft_folder import read_library
from expertmix.experts.peft_live import read_live
from expertmix.experts.spectra import Spectra, decompose_adapter


@dataclass(frozen=True, eq=False)
class Shelf:
    """Adapters in order; their numbers are the expert numbers at every site.

    Attributes:
        adapters: With unique names, at least one.

    Raises:
        CheckpointError: No adapter, or two of one name.
    """

    adapters: tuple[Spectra, ...]

    def __post_init__(self) -> None:
        if not self.adapters:
            raise CheckpointError("a shelf needs at least one adapter")
        if twice := {name for name in self.names if self.names.count(name) > 1}:
            raise CheckpointError(f"two adapters are named {min(twice)!r}: rename one")

    @classmethod
    def of(cls, adapters: Iterable[Adapter], *, known: Shelf | None = None) -> Shelf:
        """Decompose adapters.

        Args:
            adapters: In order.
            known: A shelf whose spectra are taken where name and hash are the same.
        """
        ready = {} if known is None else {(one.name, one.digest): one for one in known}
        return cls(tuple(_spectra(adapter, ready) for adapter in adapters))

    @classmethod
    def open(cls, path: str | Path | Sequence[str | Path], *, known: Shelf | None = None) -> Shelf:
        """Read a folder of PEFT adapters, one adapter's folder, or a list of those.

        Raises:
            CheckpointError: See `peft_folder.read_adapter`.
        """
        return cls.of(read_library(path), known=known)

    @classmethod
    def from_peft(cls, model: nn.Module, *, known: Shelf | None = None) -> Shelf:
        """Take all adapters of a live PeftModel.

        Raises:
            CheckpointError: See `peft_live.read_live`.
        """
        return cls.of(read_live(model), known=known)

    def plus(self, adapter: Adapter) -> Shelf:
        """The same with one more; one of that name is replaced where it stands."""
        new = decompose_adapter(adapter)
        if adapter.name not in self.names:
            return Shelf((*self.adapters, new))
        return Shelf(tuple(new if old.name == new.name else old for old in self.adapters))

    def minus(self, name: str) -> Shelf:
        """The same without one.

        Raises:
            CheckpointError: There is none of that name, or it is the last.
        """
        if name not in self.names:
            raise CheckpointError(f"no adapter {name!r} on the shelf; it has {_list(self.names)}")
        return Shelf(tuple(old for old in self.adapters if old.name != name))

    @property
    def names(self) -> tuple[str, ...]:
        """Names in order."""
        return tuple(adapter.name for adapter in self.adapters)

    @property
    def modules(self) -> tuple[str, ...]:
        """Modules at which at least one adapter does something."""
        found = {
            module: None
            for adapter in self.adapters
            for module, spectrum in adapter.modules.items()
            if spectrum.rank
        }
        return tuple(found)

    def __iter__(self) -> Iterator[Spectra]:
        return iter(self.adapters)

    def __len__(self) -> int:
        return len(self.adapters)


def _spectra(adapter: Adapter, ready: dict[tuple[str, str], Spectra]) -> Spectra:
    found = ready.get((adapter.name, adapter.digest)) if ready else None
    return decompose_adapter(adapter) if found is None else found


def _list(names: Sequence[str]) -> str:
    return ", ".join(names)
