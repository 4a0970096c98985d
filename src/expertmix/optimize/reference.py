"""The reference set: samples that the model answered right, and how it was routed then.

Knows samples, embeddings, pathways and states; `reference_build` makes it.

Legend: N references, H embedding width, D decision tokens, L critical sites, E experts, O options,
W tokens of the longest option, B samples.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from expertmix.core.pathway import Pathways, Reading
from expertmix.core.progress import Progress, quiet
from expertmix.errors import ConfigError
from expertmix.optimize import reference_folder
from expertmix.optimize.embedding import GIVEN, Embedding, embed
from expertmix.optimize.reference_build import make_plan
from expertmix.optimize.reference_meta import ReferenceMeta
from expertmix.optimize.samples import Sample
from expertmix.optimize.states import HeldStates, NoStates, RereadStates, State, States

_STACKED = ("embedding", "start", "mass")


@dataclass(frozen=True, eq=False)
class ReferenceSet:
    """Successes of a model, in the order of the samples that it was built from.

    Attributes:
        meta: Which model made it, and how.
        samples: N of them.
        embeddings: (N, H) float32.
        start: (N, D, L, E) float32, the base's pathways as logits.
        mass: (N, D, L) float32, sums of the base's weights.
        logprobs: Per reference (O, W) log-probabilities of its options' tokens.
        states: Where states come from.
        embedding: How samples are embedded as the references were.
    """

    meta: ReferenceMeta
    samples: Sequence[Sample]
    embeddings: Tensor
    start: Tensor
    mass: Tensor
    logprobs: Sequence[Tensor]
    states: States = field(default_factory=NoStates)
    embedding: Embedding = "mean"

    def __len__(self) -> int:
        return len(self.samples)

    @cached_property
    def digest(self) -> str:
        """Of all that a method can learn from: sets with the same one hold the same."""
        hashed = sha256(repr([self.meta, *self.samples]).encode())
        for values in (self.embeddings, self.start, self.mass):
            hashed.update(values.contiguous().numpy().tobytes())
        return hashed.hexdigest()

    @classmethod
    def build(
        cls,
        pathways: Pathways,
        samples: Sequence[Sample],
        *,
        embedding: Embedding = "mean",
        to: str | Path | None = None,
        states: bool = True,
        batch_size: int = 16,
        progress: Progress = quiet,
    ) -> ReferenceSet:
        """Run the model once over samples, and keep those that it gets right.

        Right is a sample whose `gold` option has the highest score (the first one of equal scores
        is the answer). With a single option nothing is chosen: its text is the target, and the
        sample always counts as a success.

        Args:
            pathways: The model, open.
            samples: With `gold`.
            embedding: `mean` or `last` of the hidden states that enter the first critical layer;
                `sentence-transformers:NAME`; a function of texts; or (len(samples), H) vectors.
            to: A folder to stream to. A killed run goes on where it stopped when it is called
                again with the same arguments; a finished one is loaded.
            states: Whether to keep what is needed to read a reference again. Without, the folder is
                small, and neighbors cost one plain pass when they are first needed.
            batch_size: Of the plain passes.
            progress: Told how many samples were read.

        Raises:
            ConfigError: No samples, one without `gold`, no successes, vectors that do not fit, or
                a folder with another build.
            ModelError: Log-probabilities or embeddings that are not finite.
            OutputError: The folder cannot be written.
            MissingDependencyError: sentence-transformers is needed and not installed.
        """
        plan = make_plan(pathways, samples, embedding, states, batch_size)
        if to is not None:
            plan.stream(Path(to), progress)
            found = cls.load(to, embedding=None if isinstance(embedding, Tensor) else embedding)
            found._check_function()
            return found
        meta, entries = plan.read(progress)
        kept = [entry.state for entry in entries if entry.state is not None]
        embeddings, values, mass = (
            torch.stack([entry.row[name] for entry in entries]) for name in _STACKED
        )
        return cls(
            meta,
            [entry.sample for entry in entries],
            embeddings,
            values,
            mass,
            [entry.row["logprobs"] for entry in entries],
            HeldStates(kept) if meta.states else NoStates(),
            GIVEN if isinstance(embedding, Tensor) else embedding,
        )

    def _check_function(self) -> None:
        """Whether a function of texts is the one that made the embeddings in a folder."""
        if isinstance(self.embedding, str | Tensor):
            return
        now = embed(self.embedding, self.samples[:1], ())
        then = self.embeddings[:1]
        if now.shape != then.shape or not torch.allclose(now, then, rtol=1e-3, atol=1e-3):
            raise ConfigError(
                "the folder holds embeddings that another function of texts made: choose another "
                "folder, or remove it first"
            )

    @classmethod
    def load(cls, folder: str | Path, *, embedding: Embedding | None = None) -> ReferenceSet:
        """Open a folder; states are read when they are needed.

        Args:
            folder: What `save` or `build(to=…)` wrote.
            embedding: The function that made given embeddings, if samples are to be embedded.

        Raises:
            ConfigError: No finished reference set, or of another format.
        """
        found = reference_folder.load(Path(folder))
        embeddings, values, mass = (torch.stack(found.parts[name]) for name in _STACKED)
        return cls(
            found.meta,
            found.samples,
            embeddings,
            values,
            mass,
            found.parts["logprobs"],
            found.states,
            found.meta.embedding if embedding is None else embedding,
        )

    def save(self, folder: str | Path) -> None:
        """Write a folder of its own; it is a reference set when its manifest is there, last.

        Raises:
            OutputError: Something is there already, or it cannot be written.
            ConfigError: States are to be saved, and are not here.
        """
        reference_folder.save(Path(folder), self.meta, self._rows())

    def _rows(self) -> Iterable[reference_folder.Entry]:
        for number, sample in enumerate(self.samples):
            row = {
                "embedding": self.embeddings[number], "start": self.start[number],
                "mass": self.mass[number], "logprobs": self.logprobs[number],
            }  # fmt: skip
            state = self.state(number) if self.meta.states else None
            yield reference_folder.Entry(number, sample, row, state)

    def state(self, number: int) -> State:
        """What `Pathways.batch` needs to read a reference again.

        Raises:
            ConfigError: States were not kept, and the set is not bound to a model.
        """
        return self.states.get(number)

    def prefetch(self, numbers: Iterable[int]) -> None:
        """The states of these references will be needed next."""
        self.states.prefetch(numbers)

    def check(self, pathways: Pathways) -> None:
        """Whether it was made with this model and these critical sites.

        Raises:
            FingerprintError: Another model.
            ConfigError: Other sites or decision tokens.
        """
        self.meta.check(pathways)

    def bound(self, pathways: Pathways) -> ReferenceSet:
        """The set for use with an open model, which reads references again if states are missing.

        Raises:
            FingerprintError: Another model.
            ConfigError: Other sites or decision tokens.
        """
        self.check(pathways)
        if self.meta.states and self.meta.exact == pathways.exact:
            return self
        return replace(self, states=RereadStates(pathways, self.samples))

    def embed(self, readings: Sequence[Reading], samples: Sequence[Sample] = ()) -> Tensor:
        """(B, H) embeddings of other samples, comparable to the references'.

        Args:
            readings: Of the samples.
            samples: The samples, needed where texts are embedded.

        Raises:
            ConfigError: Embeddings were given, or a text is missing.
            MissingDependencyError: sentence-transformers is needed and not installed.
        """
        if isinstance(self.embedding, str) and self.embedding in ("last", "mean"):
            parts = [one.last if self.embedding == "last" else one.mean for one in readings]
            return torch.stack(parts).detach().float().cpu()
        if len(samples) != len(readings):
            raise ConfigError(
                f"the embedding {self.meta.embedding!r} is made from texts: pass the "
                f"{len(readings)} samples too"
            )
        return embed(self.embedding, samples, readings)

    def subset(self, numbers: Sequence[int]) -> ReferenceSet:
        """Some of the references, in this order."""
        picked = torch.tensor(list(numbers), dtype=torch.int64)
        return replace(
            self,
            meta=replace(self.meta, succeeded=len(numbers)),
            samples=[self.samples[number] for number in numbers],
            embeddings=self.embeddings[picked],
            start=self.start[picked],
            mass=self.mass[picked],
            logprobs=[self.logprobs[number] for number in numbers],
            states=_Picked(self.states, tuple(numbers)),
        )

    def shuffled_labels(self, seed: int) -> ReferenceSet:
        """The same set with other right options: a control.

        The right options are permuted among samples with as many options, so their distribution
        stays, and what they say of their questions goes. Some keep theirs by chance, and a sample
        that is alone with its number of options always.
        """
        alike: dict[int, list[int]] = defaultdict(list)
        for number, sample in enumerate(self.samples):
            alike[len(sample.question.options)].append(number)
        generator = torch.Generator().manual_seed(seed)
        samples = list(self.samples)
        for _, numbers in sorted(alike.items()):
            order = torch.randperm(len(numbers), generator=generator).tolist()
            for number, other in zip(numbers, order, strict=True):
                gold = self.samples[numbers[other]].gold
                samples[number] = replace(self.samples[number], gold=gold)
        return replace(self, samples=samples)


@dataclass(frozen=True, slots=True)
class _Picked:
    """States of a subset."""

    states: States
    numbers: tuple[int, ...]

    def get(self, number: int) -> State:
        """Under its number in the whole set."""
        return self.states.get(self.numbers[number])

    def prefetch(self, numbers: Iterable[int]) -> None:
        """Under their numbers in the whole set."""
        self.states.prefetch([self.numbers[number] for number in numbers])
