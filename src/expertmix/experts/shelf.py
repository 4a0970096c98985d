"""A shelf: adapters of one base model in a fixed order, each with its spectra.

Frozen: adding, removing and replacing give a new shelf, which keeps the spectra of every adapter
whose hash did not change. The tensors of adapters are kept, not copied: whoever gives them must not
change them. Knows no model; `composed` puts a shelf on one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

from torch import nn

from expertmix.core.progress import Progress, quiet
from expertmix.errors import CheckpointError, OutputError
from expertmix.experts.lora import Adapter, Factors
from expertmix.experts.peft_folder import Places, Source, find_adapters
from expertmix.experts.peft_live import read_live
from expertmix.experts.spectra import Spectra, decompose_adapter, decompose_adapters
from expertmix.experts.spectra_cache import SpectraCache

Cache = bool | str | Path
"""Whether spectra are kept on the disk, or where: see `Shelf.open`."""
_READING = "reading the adapters"
_TOGETHER = 64  # adapters decomposed at once: more is not faster


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
        if twice := [name for name, count in Counter(self.names).items() if count > 1]:
            raise CheckpointError(f"two adapters are named {min(twice)!r}: rename one")

    @classmethod
    def of(cls, adapters: Iterable[Adapter], *, known: Shelf | None = None) -> Shelf:
        """Decompose adapters.

        Args:
            adapters: In order.
            known: A shelf whose spectra are taken where name and hash are the same.
        """
        ready = _Ready.of(known)
        found: list[Spectra] = []
        every = iter(adapters)
        while part := list(islice(every, _TOGETHER)):
            found += ready.spectra(part)
        return cls(tuple(found))

    @classmethod
    def open(
        cls,
        places: Places,
        *,
        known: Shelf | None = None,
        cache: Cache = False,
        progress: Progress = quiet,
    ) -> Shelf:
        """Read a folder of PEFT adapters, one adapter's folder, a hub id, or a list of those.

        Args:
            places: `adapters/`, `adapters/python`, `owner/name`, or several.
            known: A shelf whose spectra are taken where name and hash are the same.
            cache: Keep spectra on the disk: True for in the library (`.expertmix/spectra`), beside
                a single adapter, and in the hub's cache for one from there; or a folder. Where it
                cannot be written the shelf is built all the same, and `progress` is told.
            progress: Called as adapters are read.

        Raises:
            CheckpointError: See `peft_folder.read_adapter`.
        """
        return cls.load(find_adapters(places), known=known, cache=cache, progress=progress)

    @classmethod
    def load(
        cls,
        sources: Sequence[Source],
        *,
        known: Shelf | None = None,
        cache: Cache = False,
        progress: Progress = quiet,
    ) -> Shelf:
        """Read adapters that were found before; otherwise the same as `open`."""
        ready = _Ready.of(known)
        found: list[Spectra] = []
        for start in range(0, len(sources), _TOGETHER):
            progress(_READING, start, len(sources))
            part = sources[start : start + _TOGETHER]
            adapters = [source.read() for source in part]
            kept = [cache_of(source, cache) for source in part]
            found += ready.spectra(adapters, kept, progress)
        progress(_READING, len(sources), len(sources))
        return cls(tuple(found))

    @classmethod
    def from_peft(cls, model: nn.Module, *, known: Shelf | None = None) -> Shelf:
        """Take all adapters of a live PeftModel, as they are now: its tensors are copied.

        Raises:
            CheckpointError: See `peft_live.read_live`.
        """
        return cls.of((_copy(adapter) for adapter in read_live(model)), known=known)

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

    @cached_property
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


def cache_of(source: Source, cache: Cache) -> SpectraCache | None:
    """Where the spectra of an adapter are kept: see `Shelf.open`."""
    if isinstance(cache, bool):
        return SpectraCache.beside(source.home) if cache else None
    return SpectraCache(Path(cache))


@dataclass(frozen=True, eq=False)
class _Ready:
    """Spectra that need not be computed: those of a known shelf, and those on the disk."""

    known: Mapping[str, Spectra]

    @classmethod
    def of(cls, known: Shelf | None) -> _Ready:
        return cls({} if known is None else {one.name: one for one in known})

    def spectra(
        self,
        adapters: Sequence[Adapter],
        kept: Sequence[SpectraCache | None] = (),
        progress: Progress | None = None,
    ) -> list[Spectra]:
        """Of adapters, of which each may have a cache; what was computed goes there."""
        caches = kept or [None] * len(adapters)
        found = [self._find(one, cache) for one, cache in zip(adapters, caches, strict=True)]
        missing = [number for number, spectra in enumerate(found) if spectra is None]
        computed = decompose_adapters([adapters[number] for number in missing])
        for number, spectra in zip(missing, computed, strict=True):
            found[number] = spectra
            _keep(spectra, caches[number], progress)
        return [spectra for spectra in found if spectra is not None]

    def _find(self, adapter: Adapter, cache: SpectraCache | None) -> Spectra | None:
        known = self.known.get(adapter.name)
        if known is not None and known.digest == adapter.digest:
            return known
        return None if cache is None else cache.get(adapter)


def _keep(spectra: Spectra, cache: SpectraCache | None, progress: Progress | None) -> None:
    if cache is None:
        return
    try:
        cache.put(spectra)
    except OutputError as problem:
        if progress is not None:
            progress(f"spectra are not kept: {problem}", 0, 0)


def _copy(adapter: Adapter) -> Adapter:
    factors = {
        module: Factors(one.down.clone(), one.up.clone(), one.scale)
        for module, one in adapter.factors.items()
    }
    return Adapter(adapter.name, factors, adapter.base)


def _list(names: Sequence[str]) -> str:
    return ", ".join(names)
