"""Routers side by side on the same texts: `evaluate`, and the `Evaluation` that it returns.

Losses are nats per predicted token, with 95 % intervals of a bootstrap over texts; differences are
paired. Where labels name adapters it is also told how often tokens and texts go to their own
adapter, and which share of the oracle's gain a router recovers.

Legend: N texts, G levels of sites, E adapters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

from expertmix.core.estimate import Estimate
from expertmix.core.progress import Progress, quiet
from expertmix.errors import ConfigError
from expertmix.experts.compose import Calibration, ready
from expertmix.experts.fused import Combination
from expertmix.experts.shelf import Shelf
from expertmix.routers.oracle import Oracle
from expertmix.routers.router import Router
from expertmix.study.bootstrap import DRAWS, Draws, Sums, estimate, ratio
from expertmix.study.contest import Contestant, Reading, read
from expertmix.study.corpus import Corpus
from expertmix.study.routing_counts import RoutingCounts
from expertmix.study.settings import BASE, ORACLE
from expertmix.study.tracing import NOISE


def evaluate(
    base: nn.Module,
    shelf: Shelf,
    routers: Mapping[str, Router | None],
    corpus: Corpus,
    *,
    others: Sequence[Contestant] = (),
    main: str | None = None,
    combination: Combination = "outputs",
    calibration: Calibration = "own",
    batch_size: int = 8,
    progress: Progress = quiet,
) -> Evaluation:
    """Read a corpus under every router, one after the other, once each.

    Args:
        base: A causal LM of transformers, without the shelf on it.
        shelf: The adapters.
        routers: By name; None is the base alone. An `Oracle` holds an adapter's name for each text.
        corpus: The texts; `study.corpus.encode` makes it.
        others: Further contestants, such as merged models.
        main: The one that others are compared with; the first by default.
        combination: How outputs combine.
        calibration: See `experts.compose.compose`, which makes routers ready in the same way.
        batch_size: Texts per batch.
        progress: Told the texts that are done.

    Raises:
        ConfigError: No contestant, two of one name, no `main`, or a router that does not fit.
        CheckpointError: The shelf does not fit the base.
    """
    made = {
        key: None if one is None else ready(base, shelf, one, calibration)
        for key, one in routers.items()
    }
    entrants = [
        *(Contestant.routed(key, base, shelf, one, combination) for key, one in made.items()),
        *others,
    ]
    names = [entrant.name for entrant in entrants]
    if len(set(names)) < len(names) or not names:
        raise ConfigError(f"contestants need names of their own, at least one: {names}")
    main = names[0] if main is None else main
    if main not in names:
        raise ConfigError(f"no contestant {main!r} to compare with; there are {', '.join(names)}")
    found = {
        one.name: read(one, corpus, batch_size=batch_size, progress=progress) for one in entrants
    }
    return Evaluation(corpus, found, main, oracle=_oracle(routers), base=_base(routers))


def _oracle(routers: Mapping[str, Router | None]) -> str:
    return next((name for name, one in routers.items() if isinstance(one, Oracle)), ORACLE)


def _base(routers: Mapping[str, Router | None]) -> str:
    return next((name for name, one in routers.items() if one is None), BASE)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The same texts under several routers.

    Attributes:
        corpus: The texts, with their labels.
        readings: By contestant, in order; they keep the loss of each text.
        main: Whom the others are compared with.
        oracle: Name of the contestant that knows the answer, if it took part.
        base: Name of the one without adapters, if it took part.
        draws: Of the bootstrap.
        seed: Of the draws.
    """

    corpus: Corpus
    readings: Mapping[str, Reading]
    main: str
    oracle: str = ORACLE
    base: str = BASE
    draws: int = DRAWS
    seed: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Contestants in order."""
        return tuple(self.readings)

    @cached_property
    def own_labels(self) -> tuple[str, ...]:
        """Labels that name adapters."""
        known = {name for one in self._routed for name in one.experts}
        return tuple(label for label in self.corpus.labels if label in known)

    @property
    def _routed(self) -> list[RoutingCounts]:
        return [one.routing for one in self.readings.values() if one.routing is not None]

    def loss(self, name: str, label: str | None = None) -> Estimate:
        """Mean loss of the texts of a label, or of all."""
        return self._of(self._losses(name, label), label)

    def difference(self, name: str, label: str | None = None) -> Estimate:
        """Loss of a contestant minus that of the main one: below zero is better than that."""
        values = self._losses(name, label) - self._losses(self.main, label)
        return self._of(values, label)

    def recovered(self, name: str, label: str | None = None) -> Estimate | None:
        """(base − router) / (base − oracle) of losses; None unless both took part.

        Also None where the oracle gains nothing worth dividing by.
        """
        if not {self.base, self.oracle} <= set(self.readings):
            return None
        base, oracle = self._losses(self.base, label), self._losses(self.oracle, label)
        if not base[0] - oracle[0] > NOISE:
            return None
        return self._of(ratio(base - self._losses(name, label), base - oracle), label)

    def accuracy(self, name: str, label: str | None = None) -> Estimate | None:
        """Share of tokens that went to the adapter of their text's label; None where unknown."""
        counts = self._known(name, label)
        if counts is None:
            return None
        return self._of(self._share(counts.right[:, 0], counts.tokens, counts, label), label)

    def text_accuracy(self, name: str, label: str | None = None) -> Estimate | None:
        """Share of texts that as a whole gave most weight to the adapter of their label."""
        counts = self._known(name, label)
        if counts is None:
            return None
        ones = counts.tokens.new_ones(len(counts.tokens))
        return self._of(self._share(counts.right_texts, ones, counts, label), label)

    def level_accuracy(self, name: str) -> dict[str, float]:
        """Share of tokens that went right by level: all sites, layers, kinds, single sites."""
        counts = self._known(name, None)
        if counts is None:
            return {}
        tokens = float(counts.tokens[counts.own >= 0].sum())
        shares = (counts.right.sum(0) / tokens).tolist()
        return dict(zip(counts.levels.names, shares, strict=True))

    def confusion(self, name: str) -> dict[str, list[float]]:
        """By label, the share of its tokens that went to each adapter; of all labels."""
        counts = self.readings[name].routing
        if counts is None:
            return {}
        found = {}
        for label in self.corpus.labels:
            rows = list(self._rows(label))
            tokens = float(counts.tokens[rows].sum())
            found[label] = (counts.chosen[rows].sum(0) / tokens).tolist()
        return found

    def _known(self, name: str, label: str | None) -> RoutingCounts | None:
        counts = self.readings[name].routing
        labels = self.own_labels if label is None else {label} & set(self.own_labels)
        return counts if labels else None

    def _rows(self, label: str | None) -> tuple[int, ...]:
        samples = enumerate(self.corpus.samples)
        return tuple(n for n, sample in samples if label in (None, sample.label))

    @cached_property
    def _drawn(self) -> dict[str | None, Draws]:
        """The same draws for all contestants: what makes differences paired."""
        labels = (None, *self.corpus.labels)
        return {name: Draws(len(self._rows(name)), self.draws, self.seed) for name in labels}

    def _losses(self, name: str, label: str | None) -> Sums:
        reading = self.readings[name]
        return self._ratio(reading.losses, reading.predicted, label)

    def _share(self, right: Tensor, of: Tensor, counts: RoutingCounts, label: str | None) -> Sums:
        known_N = counts.own >= 0
        return self._ratio((right * known_N).tolist(), (of * known_N).tolist(), label)

    def _ratio(self, top: Sequence[float], bottom: Sequence[float], label: str | None) -> Sums:
        rows = self._rows(label)
        above, below = self._drawn[label].sums([top[n] for n in rows], [bottom[n] for n in rows])
        return ratio(above, below)

    def _of(self, values: Sums, label: str | None) -> Estimate:
        return estimate(values, len(self._rows(label)))
