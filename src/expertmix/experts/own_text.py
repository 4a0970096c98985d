"""What a model writes when it is asked nothing: text to calibrate on where there is none.

Sampled from the model itself, token by token, at temperature one; the same for the same seed on the
same machine. The cache is whichever the model makes for itself. Knows no adapter.

Legend: B rows, S columns, V vocabulary.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from expertmix.errors import UnsupportedModelError
from expertmix.experts.base_inputs import evaluating
from expertmix.experts.carried import cache_in


def own_text(model: Any, *, rows: int = 16, columns: int = 32, seed: int = 0) -> Tensor:
    """(B, S) token ids that a causal LM of transformers writes by itself.

    Args:
        model: The model; in training it writes as in evaluation, and goes on training.
        rows: B, texts.
        columns: S, tokens of each, the first one included.
        seed: Of the sampling.

    Raises:
        UnsupportedModelError: Its logits are NaN or infinite.
    """
    generator = torch.Generator().manual_seed(seed)
    ids_BS = _starts(model, rows, generator).to(model.device)
    word = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    given, cache = ids_BS, None
    with torch.no_grad(), evaluating(model):
        for _ in range(columns - 1):
            kept: dict[str, Any] = {} if cache is None else {word: cache}
            output = model(given, use_cache=True, **kept)
            cache = cache_in(output.values())
            new_B1 = _sampled(output.logits[:, -1], generator).to(model.device)
            ids_BS = torch.cat([ids_BS, new_B1], 1)
            given = ids_BS if cache is None else new_B1  # without a cache it reads all of it again
    return ids_BS


def _sampled(logits_BV: Tensor, generator: torch.Generator) -> Tensor:
    shares_BV = logits_BV.float().softmax(-1).cpu()
    if not bool(torch.isfinite(shares_BV).all()):
        raise UnsupportedModelError(
            "the base model writes no text to calibrate on: its logits are NaN or infinite. Load "
            "its weights again, or run it in another type (bfloat16 or float32)"
        )
    return torch.multinomial(shares_BV, 1, generator=generator)


def _starts(model: Any, rows: int, generator: torch.Generator) -> Tensor:
    """(B, 1): the token that begins a text, or tokens at random for want of one."""
    first = getattr(model.config.get_text_config(), "bos_token_id", None)
    if isinstance(first, int):
        return torch.full((rows, 1), first)
    vocabulary = model.get_input_embeddings().num_embeddings
    return torch.randint(vocabulary, (rows, 1), generator=generator)
