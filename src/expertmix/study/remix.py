"""`remix` and `references` for any model: open its pathways, then leave the work to `optimize`.

The front door to test-time re-mixing; holds no state. Only a study may see both how a model is read
again (`bindings`) and how better routing is found (`optimize`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from expertmix.bindings.critical import Layers
from expertmix.bindings.pathways import open_pathways
from expertmix.core.pathway import Question
from expertmix.core.progress import Progress, quiet
from expertmix.errors import ConfigError
from expertmix.optimize.embedding import Embedding
from expertmix.optimize.gate import Gate
from expertmix.optimize.neighbors import Neighbors
from expertmix.optimize.problem import Method
from expertmix.optimize.reference import ReferenceSet
from expertmix.optimize.remix import Remix
from expertmix.optimize.remix import remix as remix_opened
from expertmix.optimize.samples import Sample
from expertmix.optimize.table import method_of

Asked = Sequence[Sample] | Mapping[str, Any]
"""Samples, or what a tokenizer returns: `input_ids` and, with padding, `attention_mask`."""


def references(
    model: nn.Module,
    samples: Sequence[Sample],
    *,
    layers: Layers = "last 5",
    decisions: int = 1,
    embedding: Embedding = "mean",
    to: str | Path | None = None,
    batch_size: int = 16,
    progress: Progress = quiet,
) -> ReferenceSet:
    """Samples that the model answers right, and how it is routed then.

    Args:
        model: A MoE of transformers, or a model with routed adapters (`compose`).
        samples: With their right options.
        layers: The critical ones: `last N`, `all`, a pattern of site names, or a sequence of layer
            numbers and patterns.
        decisions: How many tokens of a prompt's end are decision tokens.
        embedding: See `ReferenceSet.build`.
        to: A folder to stream to; a killed run goes on there.
        batch_size: Samples per batch.
        progress: Told how many samples were read.

    Raises:
        NoSitesError: A dense model.
        AddressError: The layers name no routed module.
        ConfigError: No samples, one without a right option, or no successes.
        OutputError: The folder cannot be written.

    Example:
        >>> reference = em.references(model, solved, layers="last 5", to="reference/")
    """
    with open_pathways(model, layers=layers, decisions=decisions, progress=progress) as pathways:
        return ReferenceSet.build(
            pathways, samples, embedding=embedding, to=to, batch_size=batch_size, progress=progress
        )


def remix(
    model: nn.Module,
    samples: Asked,
    reference: ReferenceSet,
    method: Method | str | Mapping[str, Any] = "ngd",
    *,
    layers: Layers | None = None,
    scored: bool = False,
    neighbors: Neighbors = Neighbors(),  # noqa: B008  frozen
    gate: Gate = Gate(),  # noqa: B008  frozen
    batch_size: int = 16,
    embeddings: Tensor | None = None,
    progress: Progress = quiet,
) -> Remix:
    """Better routing for each sample, after similar ones that were solved (C3PO).

    The model's weights are not touched, and it is as it was afterwards. What was found is in the
    outcomes; `intervention()` makes it an ordinary intervention, a row per sample, at the prompt's
    last tokens: `record` applies it to a batch of the same prompts in the same order, saves it and
    replays it.

    Args:
        model: The model that the references are of.
        samples: What is to be answered; or the tokenized prompts of a batch, whose outcomes then
            have no scores that mean anything.
        reference: Made by `references`, or loaded with `ReferenceSet.load`.
        method: One of `optimize.table.METHODS` by name, as a line (`ngd steps=5`), as a mapping
            with its name as `kind`, or itself.
        layers: The critical ones; those of the references by default.
        scored: Whether the options' tokens are decision tokens too: they are routed like the last
            token of the prompt. References are the same either way.
        neighbors: Which references speak for a sample.
        gate: Which samples are adapted at all.
        batch_size: Samples per batch.
        embeddings: (len(samples), H), where the references' embeddings were given.
        progress: Told how many samples are done.

    Raises:
        FingerprintError: The references are of another model.
        ConfigError: An unknown method or setting; other layers than the references'; no samples; or
            a method that needs labels, and samples without.

    Example:
        >>> better = em.remix(model, inputs, reference, "ngd steps=5").intervention()
        >>> with em.record(model, better):
        ...     model.generate(**inputs)
    """
    chosen = method_of(method)
    asked = prompts_of(samples) if isinstance(samples, Mapping) else list(samples)
    if not asked:
        raise ConfigError("no samples: there is nothing to re-mix")
    if layers is None:
        layers = [str(info.site) for info in reference.meta.sites]
    decisions, shift = reference.meta.decisions, chosen.mode == "add"
    with (
        torch.inference_mode(False),  # a caller may be in it, and gradients are needed
        torch.enable_grad(),
        open_pathways(
            model, layers=layers, decisions=decisions, scored=scored, shift=shift, progress=progress
        ) as pathways,
    ):
        reference.check(pathways)
        return remix_opened(
            pathways, asked, reference, chosen, neighbors=neighbors, gate=gate,
            batch_size=batch_size, embeddings=embeddings, progress=progress,
        )  # fmt: skip


def prompts_of(inputs: Mapping[str, Any]) -> list[Sample]:
    """A tokenized batch as samples without options, padding left out.

    A question has one option at least, so each gets its own last token as one: it is scored, and
    the score means nothing.

    Raises:
        ConfigError: No `input_ids` of two dimensions, or a row of padding only.
    """
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        raise ConfigError("inputs need `input_ids` (rows, tokens), as a tokenizer returns them")
    mask = inputs.get("attention_mask")
    rows = []
    for number, row in enumerate(ids):
        real = row if mask is None else row[mask[number].bool()]
        if not len(real):
            raise ConfigError(f"row {number} of the inputs is padding only")
        prompt = tuple(real.tolist())
        rows.append(Sample(Question(prompt, (prompt[-1:],)), name=f"row {number}"))
    return rows
