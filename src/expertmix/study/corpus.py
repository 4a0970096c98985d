"""Texts as tokens: `Corpus`, what every run of a study reads.

It is made once and read by each run, so that all of them see the same tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from expertmix.errors import ConfigError, ContextLengthError
from expertmix.study.prompts import Prompt

UNLABELED = "unlabeled"
"""The label of a text without one, among others that have one."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One text as tokens.

    Attributes:
        ids: Token ids, at least one.
        label: Its group; None where no sample has one.
        where: File and line it comes from.
        cut: Tokens that were left off at its end.
    """

    ids: tuple[int, ...]
    label: str | None
    where: str
    cut: int = 0


@dataclass(frozen=True, slots=True)
class Corpus:
    """Samples in the order in which they were given."""

    samples: tuple[Sample, ...]

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def tokens(self) -> int:
        """Tokens in all samples."""
        return sum(len(sample.ids) for sample in self.samples)

    @property
    def truncated(self) -> int:
        """Samples that were cut."""
        return sum(sample.cut > 0 for sample in self.samples)

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels that occur, in order of appearance."""
        return tuple(dict.fromkeys(s.label for s in self.samples if s.label is not None))

    def labeled(self, label: str) -> Corpus:
        """The samples of one label."""
        return Corpus(tuple(sample for sample in self.samples if sample.label == label))

    def first(self, each: int) -> Corpus:
        """The first few samples of each label."""
        groups = (self.labeled(label).samples[:each] for label in self.labels)
        return Corpus(tuple(sample for group in groups for sample in group))

    def varied(self, most: int) -> tuple[int, ...]:
        """Numbers of a few samples, in order: one of every label before a second one of any."""
        met: Counter[str | None] = Counter()
        turns = []
        for number, sample in enumerate(self.samples):
            turns.append((met[sample.label], number))
            met[sample.label] += 1
        return tuple(sorted(number for _, number in sorted(turns)[:most]))


def encode(
    prompts: Iterable[Prompt], tokenizer: Any, *, context: int | None, truncate: bool = False
) -> Corpus:
    """Turn prompts into tokens, and check all of them before anything runs.

    Either every sample has a label or none has: where only some prompts have one, the others are
    `unlabeled`.

    Args:
        prompts: At least one.
        tokenizer: Of transformers; its own special tokens are added, as the model expects them.
        context: Tokens that the model can read, or None where there is no limit.
        truncate: Cut what is too long at its end instead of refusing it.

    Raises:
        ContextLengthError: A text is longer than the context and may not be cut.
        ConfigError: A text has no tokens.
    """
    labeled = _all_labeled(prompts)
    return Corpus(tuple(_sample(prompt, tokenizer, context, truncate) for prompt in labeled))


def encode_chat(prompts: Iterable[Prompt], tokenizer: Any) -> Corpus:
    """Each prompt as the first turn of a chat, up to where the answer begins; labels as `encode`'s.

    Args:
        prompts: At least one.
        tokenizer: Of transformers, with a chat template.

    Raises:
        ConfigError: It has none, or one that cannot take a prompt.
    """
    if not tokenizer.chat_template:
        raise ConfigError("the tokenizer has no chat template: leave out --chat (chat=True)")
    return Corpus(tuple(_turn(prompt, tokenizer) for prompt in _all_labeled(prompts)))


def _all_labeled(prompts: Iterable[Prompt]) -> tuple[Prompt, ...]:
    prompts = tuple(prompts)
    if not any(prompt.label for prompt in prompts):
        return prompts
    return tuple(replace(prompt, label=prompt.label or UNLABELED) for prompt in prompts)


def _turn(prompt: Prompt, tokenizer: Any) -> Sample:
    turn = [{"role": "user", "content": prompt.text}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return Sample(tuple(ids), prompt.label, prompt.where)


def _sample(prompt: Prompt, tokenizer: Any, context: int | None, truncate: bool) -> Sample:
    ids: Sequence[int] = tokenizer(prompt.text, verbose=False)["input_ids"]
    if not ids:
        raise ConfigError(f"{prompt.where}: the tokenizer makes no token of this text")
    if context is None or len(ids) <= context:
        return Sample(tuple(ids), prompt.label, prompt.where)
    if not truncate:
        raise ContextLengthError(
            f"{prompt.where}: the text has {len(ids)} tokens, the model reads {context}. "
            f"Shorten it, or cut such texts with --truncate (truncate=True)."
        )
    return Sample(tuple(ids[:context]), prompt.label, prompt.where, len(ids) - context)
