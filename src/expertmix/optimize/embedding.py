"""Embeddings: vectors in which similar samples lie near each other.

By default they are the model's own hidden state where it enters the first critical layer, which a
plain pass gives for nothing: of the last prompt token, or the mean over the prompt. Others come
from a sentence-transformers model, from a function of texts, or are given.

Legend: B samples, H embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from expertmix.core.pathway import Reading
from expertmix.errors import ConfigError, MissingDependencyError, ModelError
from expertmix.optimize.samples import Sample

Encoder = Callable[[Sequence[str]], Tensor]
Embedding = str | Tensor | Encoder

GIVEN = "given"
_SENTENCES = "sentence-transformers:"


def embedding_name(embedding: Embedding) -> str:
    """What a reference set says of its embeddings: their name, or `given`.

    Raises:
        ConfigError: An unknown name.
    """
    if not isinstance(embedding, str):
        return GIVEN
    if embedding in ("last", "mean", GIVEN) or embedding.removeprefix(_SENTENCES) != embedding:
        return embedding
    raise ConfigError(
        f"unknown embedding {embedding!r}: 'last', 'mean', '{_SENTENCES}NAME', a function of "
        f"texts, or a tensor (samples, width)"
    )


def embed(embedding: Embedding, samples: Sequence[Sample], readings: Sequence[Reading]) -> Tensor:
    """(B, H) float32 embeddings; those of a tensor are taken as they are.

    Args:
        embedding: Which; see `embedding_name`.
        samples: B of them; texts are needed where texts are embedded.
        readings: Of the samples.

    Raises:
        ConfigError: No texts, or vectors that do not fit.
        MissingDependencyError: sentence-transformers is not installed.
    """
    if isinstance(embedding, Tensor):
        found = embedding
    elif not isinstance(embedding, str):
        found = torch.as_tensor(embedding(texts_of(samples)))
    elif embedding == "last":
        found = torch.stack([reading.last for reading in readings])
    elif embedding == "mean":
        found = torch.stack([reading.mean for reading in readings])
    elif embedding == GIVEN:
        raise ConfigError(
            "these references have embeddings that were given: give the samples' own too "
            "(embeddings=…), or load the set with embedding= and the function that made them"
        )
    else:
        found = _sentences(embedding.removeprefix(_SENTENCES))(texts_of(samples))
    if found.dim() != 2 or len(found) != len(samples):
        raise ConfigError(
            f"embeddings of {len(samples)} samples must be ({len(samples)}, width), "
            f"not {tuple(found.shape)}"
        )
    return found.detach().float().cpu()


def check_embeddings(embeddings_BH: Tensor, samples: Sequence[Sample], name: str) -> None:
    """Refuse what cannot be compared.

    Raises:
        ConfigError: A given embedding is not finite.
        ModelError: One that a model made is not finite.
    """
    sound_B = embeddings_BH.isfinite().all(1)
    if bool(sound_B.all()):
        return
    worst = int((~sound_B).nonzero()[0])
    kind = ConfigError if name == GIVEN else ModelError
    raise kind(
        f"reference sample {label(samples[worst], worst)}: its embedding ({name}) is not finite. "
        f"Leave the sample out, or use another embedding"
    )


def label(sample: Sample, number: int) -> str:
    """How messages name a sample."""
    return repr(sample.name) if sample.name else f"number {number}"


def texts_of(samples: Sequence[Sample]) -> list[str]:
    """Their prompts as text.

    Raises:
        ConfigError: One has none.
    """
    for number, sample in enumerate(samples):
        if sample.text is None:
            raise ConfigError(
                f"sample {label(sample, number)} has no text, and this embedding is made from "
                f"texts: give samples their text, or use the embedding 'mean'"
            )
    return [sample.text or "" for sample in samples]


@cache
def _sentences(name: str) -> Encoder:
    try:
        model: Any = import_module("sentence_transformers").SentenceTransformer(name)
    except ImportError as problem:
        raise MissingDependencyError(
            f"the embedding {_SENTENCES}{name} needs sentence-transformers: "
            f"pip install sentence-transformers, or use the embedding 'mean', which needs nothing"
        ) from problem
    return lambda texts: torch.as_tensor(model.encode(list(texts), show_progress_bar=False))
