"""Choice questions as the model is asked them: `Style`, `ask`, and scores back in an item's order.

Two styles. `text`: the query and its cue, then each option's own text is scored as what follows.
`letters`: the options stand in the prompt as `A. …`, and the letter is scored; then every cyclic
shift of the options may be asked and the scores averaged, so that a liking for a letter cancels.
Base and method are given the same tokens, since both are given what is made here.

Where prompt and option meet, the tokens of the whole text are used if they begin with those of the
prompt. A tokenizer that merges across that place would give each option another prompt; then the
option's tokens are its own, ` option` tokenized alone, and the item is counted as `merged`.

Knows tokenizers; no model and no file.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from expertmix.core.pathway import Question
from expertmix.errors import ConfigError, ContextLengthError
from expertmix.optimize.samples import Sample
from expertmix.study.choice import CUE, Item
from expertmix.study.choice_layouts import LETTERS

Units = Literal["none", "tokens", "characters"]
StyleName = Literal["text", "letters"]


@dataclass(frozen=True, slots=True)
class Style:
    """How items are put to the model.

    Attributes:
        name: `text` or `letters`.
        units: What an option's log-probability is divided by: nothing, its tokens, or its
            characters. Letters are a token each, so there it makes no difference.
        permute: In `letters`, ask every cyclic shift of the options and average.
    """

    name: StyleName = "text"
    units: Units = "none"
    permute: bool = True

    def __post_init__(self) -> None:
        if self.name not in ("text", "letters"):
            raise ConfigError(f"no style {self.name!r}: text, letters")
        if self.units not in ("none", "tokens", "characters"):
            raise ConfigError(f"no units {self.units!r}: none, tokens, characters")

    def orders(self, item: Item) -> list[tuple[int, ...]]:
        """The orders of its options in which an item is asked."""
        shifts = len(item.choices) if self.permute and self.name == "letters" else 1
        return [rotated(len(item.choices), shift) for shift in range(shifts)]

    def written(self, item: Item, order: Sequence[int]) -> tuple[str, list[str]]:
        """Prompt, and what follows it for each option, in an order.

        Raises:
            ConfigError: More options than letters, or a free text, which has none to choose.
        """
        choices = [item.choices[number] for number in order]
        if self.name == "text":
            return item.prompt, choices
        if item.free or len(choices) > len(LETTERS):
            raise ConfigError(
                f"{item.where}: style letters needs 2 to {len(LETTERS)} options, and there are "
                f"{len(choices)}: use style text"
            )
        listed = "".join(f"\n{LETTERS[n]}. {choice}" for n, choice in enumerate(choices))
        return f"{item.query}{listed}{CUE}", list(LETTERS[: len(choices)])


@dataclass(frozen=True, slots=True)
class Asked:
    """An item, once, as the model is asked.

    Attributes:
        sample: Its tokens; the options in the order in which they are shown.
        item: Its number.
        order: Which option of the item stands at each place.
        merged: Whether options had to be tokenized alone.
    """

    sample: Sample
    item: int
    order: tuple[int, ...]
    merged: bool = False


def rotated(options: int, shift: int) -> tuple[int, ...]:
    """Numbers of the options, the first `shift` ones moved to the end."""
    return tuple((place + shift) % options for place in range(options))


def ask(
    items: Sequence[Item], tokenizer: Any, style: Style, *, context: int | None = None
) -> list[Asked]:
    """Test items as tokens, every one in each of its style's orders.

    Args:
        items: As `choice.sift` leaves them.
        tokenizer: Of transformers; its own special tokens begin the prompt.
        style: How they are put.
        context: Tokens that the model reads, or None where there is no limit.

    Raises:
        ContextLengthError: A prompt with its longest option is longer than the context.
        ConfigError: A text has no tokens, or the style does not fit an item.
    """
    encoder = Encoder(tokenizer, style, context)
    return [
        encoder.asked(item, number, order)
        for number, item in enumerate(items)
        for order in style.orders(item)
    ]


def ask_references(
    items: Sequence[Item],
    tokenizer: Any,
    style: Style,
    *,
    seed: int = 0,
    context: int | None = None,
) -> list[Asked]:
    """Reference items as tokens, each once, its options shifted by a number drawn from the seed.

    So the place of the right answer says nothing, whatever order a file likes. An item's own draw
    does not depend on which others there are.

    Raises:
        ContextLengthError: As `ask`.
        ConfigError: As `ask`.
    """
    encoder = Encoder(tokenizer, style, context)
    found = []
    for number, item in enumerate(items):
        asked = encoder.asked(item, number, _drawn(item, seed))
        found.append(replace(asked, sample=replace(asked.sample, name=item.name)))
    return found


def _drawn(item: Item, seed: int) -> tuple[int, ...]:
    shift = random.Random(f"{seed} {item.name}").randrange(len(item.choices))
    return rotated(len(item.choices), shift)


class Encoder:
    """Makes tokens.

    Args:
        tokenizer: Of transformers.
        style: How items are put.
        context: Tokens that the model reads.
    """

    def __init__(self, tokenizer: Any, style: Style, context: int | None) -> None:
        self._tokenizer, self._style, self._context = tokenizer, style, context
        self._closing = _closing(tokenizer)

    def asked(self, item: Item, number: int, order: tuple[int, ...]) -> Asked:
        """One item in one order."""
        prompt, shown = self._style.written(item, order)
        stem = prompt.rstrip(" ")  # a blank at the end belongs to the token that follows
        ids = self._whole(stem)
        if not ids:
            raise ConfigError(f"{item.where}: the tokenizer makes no token of the prompt")
        gaps = ["" if stem.endswith("\n") or option[0].isspace() else " " for option in shown]
        pairs = [
            self._option(stem, ids, gap + option)
            for gap, option in zip(gaps, shown, strict=True)
        ]  # fmt: skip
        merged = not all(clean for _, clean in pairs)
        options = tuple(
            self._alone(gap + option) if merged else found
            for gap, option, (found, _) in zip(gaps, shown, pairs, strict=True)
        )
        self._check(item, ids, options)
        texts = [item.choices[n] for n in order] if self._style.name == "text" else shown
        sample = Sample(
            Question(ids, options),
            order.index(item.gold),
            self._units(texts, options),
            name=item.name if order[0] == 0 else f"{item.name}#{order[0]}",
            text=prompt,
            item=item.name,
        )
        return Asked(sample, number, order, merged)

    def _option(self, stem: str, ids: tuple[int, ...], text: str) -> tuple[tuple[int, ...], bool]:
        """Tokens that a text adds to a prompt, and whether the prompt's own stay as they are."""
        whole = self._whole(stem + text)
        return whole[len(ids) :], whole[: len(ids)] == ids and len(whole) > len(ids)

    def _whole(self, text: str) -> tuple[int, ...]:
        ids = self._tokenizer(text, verbose=False)["input_ids"]
        return tuple(ids[: len(ids) - self._closing])

    def _alone(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _units(
        self, texts: Sequence[str], options: Sequence[tuple[int, ...]]
    ) -> tuple[float, ...]:  # fmt: skip
        if self._style.units == "none":
            return ()
        if self._style.units == "tokens":
            return tuple(float(len(option)) for option in options)
        return tuple(float(len(text)) for text in texts)

    def _check(self, item: Item, ids: tuple[int, ...], options: Sequence[tuple[int, ...]]) -> None:
        for place, option in enumerate(options):
            if not option:
                raise ConfigError(f"{item.where}: the tokenizer makes no token of option {place}")
        longest = max(map(len, options))
        if self._context is not None and len(ids) + longest > self._context:
            raise ContextLengthError(
                f"{item.where}: item {item.name!r} has a prompt of {len(ids)} tokens and an option "
                f"of {longest}, the model reads {self._context}. Shorten it or remove it."
            )


def item_scores(
    asked: Iterable[Asked], scores: Iterable[Sequence[float]]
) -> dict[int, list[float]]:
    """Mean score of each option, in the item's own order, over the orders in which it was asked.

    Args:
        asked: Some items, each in all of its orders.
        scores: Of their options, as they were shown; what is beyond the options is ignored.

    Returns:
        Number of an item -> one score per option.
    """
    sums: dict[int, list[float]] = {}
    counts: dict[int, int] = {}
    for one, shown in zip(asked, scores, strict=True):
        own = sums.setdefault(one.item, [0.0] * len(one.order))
        counts[one.item] = counts.get(one.item, 0) + 1
        for place, number in enumerate(one.order):
            own[number] += shown[place]
    return {item: [value / counts[item] for value in own] for item, own in sums.items()}


def _closing(tokenizer: Any) -> int:
    """How many tokens a tokenizer puts behind a text: an option would follow them."""
    ids, plain = (
        tokenizer("a", add_special_tokens=special, verbose=False)["input_ids"]
        for special in (True, False)
    )
    for start in range(len(ids) - len(plain) + 1):
        if plain and ids[start : start + len(plain)] == plain:
            return len(ids) - start - len(plain)
    return 0
