"""Routers fitted without a training run: to which expert does this token's text belong?

For every layer a linear map of the MLP's input, as Mixtral's gate is, fitted to the expert that
each calibration text was given for. Layers are fitted first to last within one forward pass, and
each layer routes with its own router before the next is fitted, so a router learns from the
hidden states that the finished MoE produces, not from the base's.

Two fits (`regression`): "ridge", closed form and then one temperature, and "logistic", a softmax
regression started at the ridge solution: a convex problem, solved in a few steps of L-BFGS.
No randomness in either.

Shape legend: N rows of text, S length, T tokens, E experts, H hidden size.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from expertmix.core.progress import Progress, quiet
from expertmix.errors import CheckpointError, ConfigError
from expertmix.models.library import Library
from expertmix.models.mixtral import BASE_EXPERT, expert_names
from expertmix.models.regression import METHODS as METHODS
from expertmix.models.regression import Problem
from expertmix.models.unmerged import routed

Routers = dict[int, Tensor]

_FEWEST_TOKENS = 2  # one to fit, one to choose penalty and temperature


def fit_routers(
    model: Any,
    tokenizer: Any,
    library: Library,
    texts: Mapping[str, Sequence[str]],
    *,
    method: str = "logistic",
    top_k: int = 2,
    include_base: bool = True,
    length: int = 128,
    rows: int = 32,
    progress: Progress = quiet,
) -> Routers:
    """Fits one router per layer to the texts of each expert.

    Args:
        model: the dense base, a Llama-like causal LM of transformers.
        tokenizer: its tokenizer.
        library: adapters on its MLPs.
        texts: expert name -> a few texts that it should serve. Every adapter needs some; the
            base may have some under "base". Without, its router row is zero: it serves tokens
            for which no expert's evidence is positive.
        method: "ridge" or "logistic".
        top_k: experts per token while fitting.
        include_base: the unchanged base MLP is expert 0.
        length: tokens per row; longer texts make several rows.
        rows: at most so many rows of each expert are used.
        progress: told after every layer.

    Returns:
        layer -> router weight, float32 [E, H].

    Raises:
        ConfigError: unknown method, an expert without enough text, or texts of an unknown
            expert.
    """
    if method not in METHODS:
        raise ConfigError(f"unknown router fit {method!r}; known: {', '.join(METHODS)}")
    names = expert_names(library, include_base=include_base)
    ids_NS, labels_NS = _calibration(tokenizer, names, texts, length, rows)
    layers = model.config.num_hidden_layers
    fitter = _Fitter(labels_NS, len(names), METHODS[method], layers, progress)
    with torch.no_grad(), routed(model, library, fitter, top_k=top_k, include_base=include_base):
        model.model(input_ids=ids_NS, use_cache=False)
    return fitter.routers


def random_routers(config: Any, experts: int, seed: int = 0) -> Routers:
    """Untrained routers, the control: normal weights whose logits have a deviation near one.

    Args:
        config: of the base; gives layers and H.
        experts: E.
        seed: of the generator.

    Returns:
        layer -> router weight, float32 [E, H].
    """
    generator = torch.Generator().manual_seed(seed)
    width = config.hidden_size
    return {
        layer: torch.randn(experts, width, generator=generator) / width**0.5
        for layer in range(config.num_hidden_layers)
    }


def save_routers(path: Path, routers: Mapping[int, Tensor], names: Sequence[str]) -> None:
    """Writes routers as bfloat16 safetensors that remember the experts' names."""
    tensors = {f"layers.{i}": w.to(torch.bfloat16).contiguous() for i, w in routers.items()}
    save_file(tensors, path, {"experts": json.dumps(list(names))})


def load_routers(path: str | Path, names: Sequence[str]) -> Routers:
    """Reads routers that `save_routers` wrote.

    Args:
        path: a safetensors file.
        names: the experts they must be for, in order.

    Returns:
        layer -> router weight, float32 [E, H].

    Raises:
        CheckpointError: missing or broken, or for other experts.
    """
    try:
        with safe_open(path, "pt") as file:
            found = json.loads((file.metadata() or {}).get("experts", "[]"))
            keys = list(file.keys())
            routers = {int(k.removeprefix("layers.")): file.get_tensor(k).float() for k in keys}
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"cannot read routers from {path}: {error}") from error
    if found != list(names):
        raise CheckpointError(f"routers in {path} are for experts {found}, not {list(names)}")
    return routers


class _Fitter:
    """Decides as a router does, but fits that router first, once per layer."""

    def __init__(
        self,
        labels_NS: Tensor,
        experts: int,
        fit: Callable[[Problem], Tensor],
        layers: int,
        progress: Progress,
    ) -> None:
        self.routers: Routers = {}
        self._labels_NS, self._experts, self._fit = labels_NS, experts, fit
        self._layers, self._progress = layers, progress

    def __call__(self, layer: int, x_TH: Tensor) -> Tensor:
        self.routers[layer] = self._fit(Problem.of(x_TH, self._labels_NS, self._experts))
        self._progress("fitting routers", layer + 1, self._layers)
        return x_TH @ self.routers[layer].T


def _calibration(
    tokenizer: Any,
    names: Sequence[str],
    texts: Mapping[str, Sequence[str]],
    length: int,
    rows: int,
) -> tuple[Tensor, Tensor]:
    """Token ids [N, S] and the expert of each token [N, S], -1 where there is padding."""
    _check_texts(names, texts)
    ids: list[Tensor] = []
    labels: list[Tensor] = []
    for index, name in enumerate(names):
        found = _rows(tokenizer, texts.get(name, ()), length)[:rows]
        if name in texts and sum(map(len, found)) < _FEWEST_TOKENS:
            raise ConfigError(f"expert {name!r} has too little text to fit its router: give more")
        for row in found:
            padding = length - len(row)
            ids.append(functional.pad(row, (0, padding)))
            labels.append(functional.pad(torch.full_like(row, index), (0, padding), value=-1))
    return torch.stack(ids), torch.stack(labels)


def _rows(tokenizer: Any, texts: Sequence[str], length: int) -> list[Tensor]:
    """Each text cut into rows of at most `length` tokens."""
    rows: list[Tensor] = []
    for text in texts:
        ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
        rows += [part for part in torch.split(ids, length) if len(part)]
    return rows


def _check_texts(names: Sequence[str], texts: Mapping[str, Sequence[str]]) -> None:
    for name in texts:
        if name not in names:
            raise ConfigError(f"texts name an unknown expert {name!r}; known: {', '.join(names)}")
    for name in names:
        if name != BASE_EXPERT and not any(text.strip() for text in texts.get(name, ())):
            raise ConfigError(f"expert {name!r} needs at least one text to fit its router")
