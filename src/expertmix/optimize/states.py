"""Where the states of references come from: memory, a folder, or one more plain pass.

A state is what `Pathways.batch` needs to read a question again. For a long prompt it is large, so
few are held at a time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor

from expertmix.core.pathway import Pathways
from expertmix.errors import ConfigError
from expertmix.optimize.samples import Sample
from expertmix.optimize.store import RowFile

State = Mapping[str, Tensor]
_HELD = 256 * 2**20  # bytes of states that are kept after they were read


class States(Protocol):
    """States by number."""

    def get(self, number: int) -> State:
        """One of them."""

    def prefetch(self, numbers: Iterable[int]) -> None:
        """These will be asked for next: get them together, where that is cheaper."""


class NoStates:
    """None were kept."""

    def get(self, number: int) -> State:
        """Always an error."""
        raise ConfigError(
            "this reference set keeps no states: bind it to the open model "
            "(`reference.bound(pathways)`), which reads its samples again, or build it with states"
        )

    def prefetch(self, numbers: Iterable[int]) -> None:
        """Nothing to get."""


class HeldStates:
    """All in memory."""

    def __init__(self, states: Sequence[State]) -> None:
        self._states = states

    def get(self, number: int) -> State:
        """One of them."""
        return self._states[number]

    def prefetch(self, numbers: Iterable[int]) -> None:
        """They are here."""


class StoredStates:
    """In files of a folder.

    Args:
        folder: Where the files are.
        places: Per state its file's name and its row there.
    """

    def __init__(self, folder: Path, places: Sequence[tuple[str, int]]) -> None:
        self._folder, self._places = folder, places
        self._files: dict[str, RowFile] = {}
        self._held = Held()

    def get(self, number: int) -> State:
        """One of them, read from its file."""
        found = self._held.find(number)
        if found is None:
            name, row = self._places[number]
            if name not in self._files:
                self._files[name] = RowFile(self._folder / name)
            found = self._held.keep(number, self._files[name].row(row))
        return found

    def prefetch(self, numbers: Iterable[int]) -> None:
        """Files are fast enough one by one."""


class RereadStates:
    """Made by reading the references again.

    Args:
        pathways: The model, open.
        samples: All references.
        batch_size: Of a pass.
    """

    def __init__(self, pathways: Pathways, samples: Sequence[Sample], batch_size: int = 16) -> None:
        self._pathways, self._samples, self._batch = pathways, samples, batch_size
        self._held = Held()

    def get(self, number: int) -> State:
        """One of them, read now if it was not prefetched."""
        found = self._held.find(number)
        if found is None:
            reading = self._pathways.read([self._samples[number].question])[0]
            found = self._held.keep(number, reading.state)
        return found

    def prefetch(self, numbers: Iterable[int]) -> None:
        """Read them in batches of about equal length."""
        wanted = set(numbers)
        self._held.least = max(1, len(wanted))
        lacking = sorted(
            (number for number in wanted if self._held.find(number) is None),
            key=lambda number: (len(self._samples[number].question.prompt), number),
        )
        for start in range(0, len(lacking), self._batch):
            part = lacking[start : start + self._batch]
            readings = self._pathways.read([self._samples[number].question for number in part])
            for number, reading in zip(part, readings, strict=True):
                self._held.keep(number, reading.state)


class Held:
    """The states that were used last.

    Args:
        limit: Bytes that they may take.

    Attributes:
        least: So many are held in any case.
    """

    def __init__(self, limit: int = _HELD) -> None:
        self.least = 1
        self._limit, self._bytes = limit, 0
        self._states: OrderedDict[int, State] = OrderedDict()

    def find(self, number: int) -> State | None:
        """The state, if it is here."""
        if number in self._states:
            self._states.move_to_end(number)
        return self._states.get(number)

    def keep(self, number: int, state: State) -> State:
        """Hold a state that is not here, and let go of those that were used longest ago."""
        self._states[number] = state
        self._bytes += _size(state)
        while self._bytes > self._limit and len(self._states) > self.least:
            self._bytes -= _size(self._states.popitem(last=False)[1])
        return state


def _size(state: State) -> int:
    return sum(tensor.nbytes for tensor in state.values())
