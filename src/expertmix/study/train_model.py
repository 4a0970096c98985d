"""The model and the tokenizer of a training run: opened, or made anew."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    set_seed,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from expertmix.core.progress import Progress, quiet
from expertmix.errors import ConfigError, ContextLengthError, ExpertmixError
from expertmix.study.loading import context_length, load_model, load_tokenizer
from expertmix.study.train_processes import is_first, wait
from expertmix.study.train_settings import OWN, New, TrainSettings
from expertmix.study.train_yaml import unknown_key

_END = "<|endoftext|>"
_OWN_KEYS = ("type", "tokenizer")
_SMALLEST = 257  # bytes and the end of a text
_AUTO: Any = AutoModelForCausalLM


def open_tokenizer(settings: TrainSettings, texts: Sequence[str]) -> Any:
    """The tokenizer of the model, or of the section `new`.

    Args:
        settings: What is asked for.
        texts: What an `own` one is trained on.

    Raises:
        ConfigError: None is named, or too small a vocabulary.
        CheckpointError: There is none.
    """
    if not isinstance(settings.model, New):
        return load_tokenizer(settings.model)
    name = settings.model.new.get("tokenizer")
    if not isinstance(name, str):
        raise ConfigError(
            f"model.new.tokenizer is missing: give a folder, a hub id, default, or {OWN} for one "
            f"that is trained on the texts"
        )
    return (
        _own(texts, settings.model.new.get("vocab_size")) if name == OWN else load_tokenizer(name)
    )


def _own(texts: Sequence[str], size: Any) -> Any:
    """Byte-level BPE: no text has a token that it lacks."""
    from tokenizers import ByteLevelBPETokenizer

    if not isinstance(size, int) or size < _SMALLEST:
        raise ConfigError(
            f"model.new.vocab_size={size!r}: with tokenizer: {OWN}, give a number from {_SMALLEST} "
            f"on, such as 2048"
        )
    made = ByteLevelBPETokenizer()
    made.train_from_iterator(texts, vocab_size=size, special_tokens=[_END], show_progress=False)
    fast: Any = PreTrainedTokenizerFast
    return fast(tokenizer_object=made._tokenizer, eos_token=_END, pad_token=_END)


def new_config(settings: TrainSettings, tokenizer: Any) -> Any:
    """The config of a new model, every field checked.

    Raises:
        ConfigError: An unknown type or field, a wrong value, or too small a vocabulary.
    """
    assert isinstance(settings.model, New)
    given = dict(settings.model.new)
    kind = given.pop("type", None)
    given.pop("tokenizer", None)
    if kind not in CONFIG_MAPPING:
        near = get_close_matches(str(kind), list(CONFIG_MAPPING), n=1)
        hint = f"did you mean {near[0]}?" if near else "give coe, olmoe, mixtral, …"
        raise ConfigError(f"model.new.type: transformers knows no type {kind!r}: {hint}")
    known = [one.name for one in fields(CONFIG_MAPPING[kind])]
    for key in given:
        if key not in known:
            raise unknown_key(f"model.new.{key}", key, [*_OWN_KEYS, *known])
    size = given.setdefault("vocab_size", len(tokenizer))
    if isinstance(size, int) and size < len(tokenizer):
        raise ConfigError(
            f"model.new.vocab_size={size} is less than the {len(tokenizer)} tokens of the "
            f"tokenizer: leave it out"
        )
    special = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    try:
        return AutoConfig.for_model(kind, **{"pad_token_id": None, **special, **given})
    except (StrictDataclassError, TypeError, ValueError, ExpertmixError) as problem:
        raise ConfigError(f"model.new: {' '.join(str(problem).split())}") from problem


def check_context(settings: TrainSettings, config: Any, tokenizer: Any) -> None:
    """Refuse blocks that are longer than what the model can read.

    Raises:
        ContextLengthError: They are.
    """
    limit = context_length(config, tokenizer)
    if limit is not None and settings.sequence_length > limit:
        raise ContextLengthError(
            f"sequence_length={settings.sequence_length} is more than the {limit} tokens that the "
            f"model can read: lower it"
        )


def open_model(
    settings: TrainSettings,
    config: Any | None,
    *,
    at: Path | None = None,
    progress: Progress = quiet,
) -> Any:
    """The model to train, in float32 on the processor.

    Args:
        settings: What is asked for.
        config: Of a new model; None opens the one that is named.
        at: A checkpoint of the run to open instead.
        progress: Told of the loading.

    Raises:
        ModelError: It cannot be opened.
        ConfigError: transformers has no such experts implementation.
    """
    if at is not None:
        model = load_model(str(at), dtype="float32", device="cpu", progress=progress)
    elif config is not None:
        set_seed(settings.seed)
        with _float32():
            model = _AUTO.from_config(config, trust_remote_code=False)
    else:
        assert isinstance(settings.model, str)
        model = load_model(settings.model, dtype="float32", device="cpu", progress=progress)
    try:
        model.set_experts_implementation(settings.experts_implementation)
    except (ValueError, KeyError) as problem:
        raise ConfigError(
            f"experts_implementation={settings.experts_implementation!r}: {problem}"
        ) from problem
    return model


def shard_model(model: Any, folder: Path, distributed: Any, settings: TrainSettings) -> Any:
    """A model shared out over all processes, each of which has opened it.

    transformers shards while it reads: the weights go through a folder, which is removed.

    Args:
        model: Where all of it is.
        folder: For its weights; removed in the end.
        distributed: How it is shared out.
        settings: Name the experts implementation.
    """
    if is_first():
        model.save_pretrained(folder)
    wait()
    part = _AUTO.from_pretrained(
        folder,
        dtype="float32",
        distributed_config=distributed,
        experts_implementation=settings.experts_implementation,
    )
    wait()
    if is_first():
        shutil.rmtree(folder, ignore_errors=True)
    return part


@contextmanager
def _float32() -> Iterator[None]:
    """Models are made in torch's default type."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
