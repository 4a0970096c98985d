"""Ways to read the same texts, and what came of each: `Contestant`, `Reading`, `read`.

A contestant is a name and a context manager that gives a model: the base alone, adapters under a
router, a merged model, PEFT's own Arrow. Where the model routes, it is also counted where the
tokens went.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import nn

from expertmix.bindings.record import record
from expertmix.core.progress import Progress, quiet
from expertmix.core.trace import Trace
from expertmix.errors import ConfigError
from expertmix.experts.composed import Composed
from expertmix.experts.fused import Combination
from expertmix.experts.shelf import Shelf
from expertmix.routers.oracle import Oracle
from expertmix.routers.router import Router
from expertmix.study.corpus import Corpus
from expertmix.study.routing_counts import RoutingCounter, RoutingCounts
from expertmix.study.tracing import batches, sample_losses


@dataclass(frozen=True, eq=False, slots=True)
class Contestant:
    """One way to read texts.

    Attributes:
        name: In tables.
        open: Gives a context manager of what reads: a causal LM, or a `Composed`, whose routing is
            then counted.
        told: For an oracle: an adapter's name for each text of the corpus, in order.
    """

    name: str
    open: Callable[[], AbstractContextManager[Any]]
    told: tuple[str, ...] | None = None

    @classmethod
    def model(cls, name: str, model: Any) -> Contestant:
        """A causal LM as it is."""
        return cls(name, lambda: nullcontext(model))

    @classmethod
    def routed(
        cls,
        name: str,
        base: nn.Module,
        shelf: Shelf,
        router: Router | None,
        combination: Combination = "outputs",
    ) -> Contestant:
        """Adapters under a router; the base alone where the router is None.

        An `Oracle` holds one adapter's name for each text of the corpus.
        """
        if router is None:
            return cls.model(name, base)
        told = router.adapters if isinstance(router, Oracle) else None
        first = router if told is None else Oracle(told[:1])
        return cls(name, lambda: Composed(base, shelf, first, combination=combination), told)


@dataclass(frozen=True, eq=False, slots=True)
class Reading:
    """What came of one contestant.

    Attributes:
        name: The contestant's.
        losses: Per text, nats summed over its predicted tokens, taken in float32.
        predicted: Per text, how many tokens that were.
        seconds: Wall-clock time.
        routing: Where tokens went; None of a model that does not route adapters.
    """

    name: str
    losses: tuple[float, ...]
    predicted: tuple[int, ...]
    seconds: float
    routing: RoutingCounts | None = None


def read(
    contestant: Contestant, corpus: Corpus, *, batch_size: int = 8, progress: Progress = quiet
) -> Reading:
    """Read a corpus once, without gradients, padded on the right.

    Raises:
        ConfigError: A batch size below one, or an oracle that was told of other texts.
    """
    if contestant.told is not None and len(contestant.told) != len(corpus):
        raise ConfigError(
            f"{contestant.name!r} was told the adapters of {len(contestant.told)} texts, there are "
            f"{len(corpus)}"
        )
    losses = [0.0] * len(corpus)
    start, done = time.perf_counter(), 0
    stage = f"reading: {contestant.name}"
    progress(stage, 0, len(corpus))
    with contestant.open() as opened:
        counter = _counter(opened, [sample.label for sample in corpus.samples])
        for numbers in batches(_order(contestant, corpus), batch_size):
            with _watched(opened, contestant, numbers, counter) as model:
                found = sample_losses(model, [corpus.samples[number] for number in numbers])
            for number, loss in zip(numbers, found, strict=True):
                losses[number] = loss * predicted(corpus, number)
            done += len(numbers)
            progress(stage, done, len(corpus))
    return Reading(
        contestant.name,
        tuple(0.0 if math.isnan(loss) else loss for loss in losses),
        tuple(predicted(corpus, number) for number in range(len(corpus))),
        time.perf_counter() - start,
        None if counter is None else counter.result(),
    )


def predicted(corpus: Corpus, number: int) -> int:
    """Tokens of a text that have another before them."""
    return len(corpus.samples[number].ids) - 1


def _order(contestant: Contestant, corpus: Corpus) -> list[int]:
    """Long texts together, which saves padding; an oracle's texts also by adapter."""
    told: Mapping[int, str] = dict(enumerate(contestant.told or ()))
    return sorted(range(len(corpus)), key=lambda n: (told.get(n, ""), -len(corpus.samples[n].ids)))


def _counter(opened: Any, labels: Sequence[str | None]) -> RoutingCounter | None:
    return RoutingCounter(opened.sites, labels) if isinstance(opened, Composed) else None


@contextmanager
def _watched(
    opened: Any, contestant: Contestant, numbers: Sequence[int], counter: RoutingCounter | None
) -> Iterator[Any]:
    """The model to call; what it routes is counted afterwards."""
    if counter is None:
        yield opened
        return
    tell(opened, contestant.told, numbers)
    with record(opened) as trace:
        yield opened.model
    _count(trace, counter, numbers)


def tell(composed: Composed, told: Sequence[str] | None, numbers: Sequence[int]) -> None:
    """Tell an oracle whose texts come next, unless it knows already."""
    if told is None:
        return
    router = Oracle(tuple(told[number] for number in numbers))
    if composed.plan.router != router:
        composed.change(router=router)


def _count(trace: Trace, counter: RoutingCounter, numbers: Sequence[int]) -> None:
    for chunk in trace.chunks():
        counter.add(chunk, numbers)
