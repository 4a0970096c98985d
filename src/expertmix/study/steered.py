"""Generation under re-mixed routing: `generate`.

The override is at the last prompt token only, where the first new token is made; all later tokens
are routed by the model itself. With `every`, the text so far becomes the prompt again after so many
tokens, and is re-mixed anew. Nothing of an override outlives its round.

Legend: B prompts, S columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expertmix.bindings.record import record
from expertmix.core.progress import Progress, quiet
from expertmix.errors import ConfigError
from expertmix.optimize.gate import Gate
from expertmix.optimize.neighbors import Neighbors
from expertmix.optimize.problem import Method
from expertmix.optimize.reference import ReferenceSet
from expertmix.optimize.remix import Remix
from expertmix.study.remix import prompts_of, remix


@dataclass(frozen=True, eq=False, slots=True)
class Steered:
    """What was generated.

    Attributes:
        ids: Per prompt the new token ids, up to and without the token that ended it.
        rounds: Per round, which prompts were still open, and what was found for them.
    """

    ids: tuple[tuple[int, ...], ...]
    rounds: tuple[tuple[tuple[int, ...], Remix], ...]


def generate(
    model: Any,
    inputs: Mapping[str, Any],
    reference: ReferenceSet,
    method: Method | str | Mapping[str, Any] = "ngd",
    *,
    every: int | None = None,
    max_new_tokens: int = 40,
    neighbors: Neighbors = Neighbors(),  # noqa: B008  frozen
    gate: Gate = Gate(),  # noqa: B008  frozen
    batch_size: int = 16,
    progress: Progress = quiet,
) -> Steered:
    """Continue prompts with the likeliest tokens, their routing re-mixed at the last prompt token.

    Args:
        model: A causal LM of transformers.
        inputs: `input_ids` and, with padding on either side, `attention_mask`.
        reference: See `remix`.
        method: See `remix`.
        every: Re-mix again after so many tokens; None: once. Each time costs a plain pass over the
            text so far, and the method.
        max_new_tokens: Length of what is added, at most.
        neighbors: See `remix`.
        gate: See `remix`.
        batch_size: Of re-mixing.
        progress: Told how many tokens were added.

    Raises:
        ConfigError: A number below one, or whatever `remix` finds.
    """
    for name, value in (("every", every), ("max_new_tokens", max_new_tokens)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, not {value}")
    texts = [sample.question.prompt for sample in prompts_of(inputs)]
    made: list[tuple[int, ...]] = [() for _ in texts]
    left, rounds, ends = list(range(len(texts))), [], _ends(model)
    done = 0
    while left and done < max_new_tokens:
        count = min(every or max_new_tokens, max_new_tokens - done)
        batch = _padded([(*texts[row], *made[row]) for row in left], _device(model))
        found = remix(
            model, batch, reference, method, neighbors=neighbors, gate=gate, batch_size=batch_size
        )
        new = _continued(model, batch, found, count, ends)
        rounds.append((tuple(left), found))
        for row, ids in zip(left, new, strict=True):
            made[row] += ids
        left = [row for row, ids in zip(left, new, strict=True) if len(ids) == count]
        done += count
        progress("generating", done, max_new_tokens)
    return Steered(tuple(made), tuple(rounds))


@torch.inference_mode()
def _continued(
    model: Any, batch: Mapping[str, Tensor], found: Remix, count: int, ends: set[int]
) -> list[tuple[int, ...]]:
    """New ids of each row, up to its end."""
    edits = found.intervention()
    with record(model, *edits.parts()):
        whole_BS = model.generate(
            **batch, max_new_tokens=count, do_sample=False, temperature=None, top_p=None,
            top_k=None, pad_token_id=min(ends, default=0), eos_token_id=sorted(ends) or None,
        )  # fmt: skip
    new_BS = whole_BS[:, batch["input_ids"].shape[1] :]
    return [_until(row, ends) for row in new_BS.tolist()]


def _ends(model: Any) -> set[int]:
    own = model.generation_config.eos_token_id
    return {int(end) for end in (own if isinstance(own, list) else [own]) if end is not None}


def _until(ids: Sequence[int], ends: set[int]) -> tuple[int, ...]:
    stop = next((place for place, one in enumerate(ids) if one in ends), len(ids))
    return tuple(ids[:stop])


def _padded(texts: Sequence[tuple[int, ...]], device: torch.device) -> dict[str, Tensor]:
    """(B, S) ids with padding in front, and their mask."""
    width = max(map(len, texts))
    ids = [[*[0] * (width - len(text)), *text] for text in texts]
    real = [[0] * (width - len(text)) + [1] * len(text) for text in texts]
    return {
        "input_ids": torch.tensor(ids, device=device),
        "attention_mask": torch.tensor(real, device=device),
    }


def _device(model: Any) -> torch.device:
    found: torch.device = next(model.parameters()).device
    return found
