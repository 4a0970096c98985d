"""Evidence that decoding continues from, kept in the cache to which it belongs.

A router that pools evidence over tokens must know at the next step what it has read before. That is
state of the request, as keys and values are, so it is kept where those are: as one more layer of
transformers' cache, which then reorders it for beams, cuts it back for speculative decoding, copies
and drops it together with them. Evidence of another composition is left, and begins anew. Knows
transformers' caches, and no router.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DummyLayer

from expertmix.errors import UnsupportedRuntimeError
from expertmix.routers.memory import Past


class _Owner:
    """Whose evidence it is, held weakly; once pickled, who it was cannot be known any more."""

    def __init__(self, owner: object | None = None) -> None:
        self._reference: Any = None if owner is None else weakref.ref(owner)

    @property
    def known(self) -> bool:
        return self._reference is not None

    def is_(self, owner: object) -> bool:
        return self.known and self._reference() is owner

    def __deepcopy__(self, memo: dict[int, Any]) -> _Owner:
        return self

    def __reduce__(self) -> tuple[type[_Owner], tuple[()]]:
        return _Owner, ()


class Carried(DummyLayer):
    """A layer of a cache that holds no keys: attention and masks pass it over.

    Attributes:
        owner: Whose evidence it is.
        past: The evidence; None before there is any.
        lost: Whether the cache was cut back further than positions are kept.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.owner = _Owner()
        self.past: Past | None = None
        self.lost = False

    def reset(self) -> None:
        """Forget everything."""
        self.past, self.lost = None, False

    def crop(self, tokens_to_remove: int) -> None:
        """Go back; so far only as positions are kept."""
        if tokens_to_remove and self.past is not None:
            self.past = self.past.cut(abs(tokens_to_remove))
            self.lost = self.past is None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Take rows."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Take rows."""
        if self.past is not None:
            self.past = self.past.rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat rows."""
        if self.past is not None:
            self.past = self.past.repeated(repeats)


def cache_in(values: Iterable[Any]) -> Cache | None:
    """The first cache among the arguments or results of a model."""
    return next((value for value in values if isinstance(value, Cache)), None)


def evidence_in(cache: Cache | None, owner: object, rows: int) -> Past | None:
    """What a cache holds of an owner's evidence: None where it has read nothing yet.

    Raises:
        UnsupportedRuntimeError: It was lost, comes from a pickle, or is of other rows.
    """
    carried = _layer(cache)
    if carried is None:
        return None
    if not carried.owner.known:
        raise UnsupportedRuntimeError(
            "the cache was pickled, and whose evidence it holds was lost, so this router cannot go "
            "on from it. Read the text again, or use a router without memory, such as SpectR."
        )
    if not carried.owner.is_(owner):
        return None
    if carried.lost:
        raise UnsupportedRuntimeError(
            "the cache was cut back further than evidence is kept, so this router cannot go on "
            "from it. Read the text again, or use a router without memory, such as SpectR."
        )
    if carried.past is not None and len(carried.past.counts) != rows:
        raise UnsupportedRuntimeError(
            f"the cache holds evidence of {len(carried.past.counts)} rows, the batch has {rows}: "
            f"change it by reorder_cache, batch_select_indices or batch_repeat_interleave only"
        )
    return carried.past


def keep_evidence(cache: Cache, owner: object, past: Past) -> None:
    """Put an owner's evidence into a cache, in place of what is there."""
    carried = _layer(cache)
    if carried is None:
        carried = Carried()
        cache.layers.append(carried)
    carried.owner, carried.past, carried.lost = _Owner(owner), past, False


def _layer(cache: Cache | None) -> Carried | None:
    layers = () if cache is None else cache.layers
    return next((layer for layer in layers if isinstance(layer, Carried)), None)
