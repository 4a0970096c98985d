"""Multiple-choice questions of ten families, made from a seed: plain ones, and shifted ones.

Knows how a question of each family is written, and what its right answer is. Knows no model and no
tokenizer. A family is a function (random, shifted) -> `Draft`; its plain version trains a model
and gives reference samples; its shifted one (longer, wider, or worded otherwise) tests.

Splits are disjoint by construction: a stem's checksum says which split may hold it. What must be
known by heart is the same in the whole corpus: the alphabet, the categories of words, the days of
the week, and the people of a made-up world; so a fact that a reference row asks for is trained
on, but in other words. The four choices of a question begin with four different words, digits or
letters: the first token of an answer decides, and no choice is the beginning of another.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal

Split = Literal["train", "reference", "development", "test"]

# Which tenths of all stems a split may hold. The first two are plain, the last two shifted.
TENTHS: dict[Split, range] = {
    "train": range(8),
    "reference": range(8, 10),
    "development": range(5),
    "test": range(5, 10),
}
TRIES = 50  # draws per wanted question, before a family counts as exhausted


def _words(text: str) -> list[str]:
    return text.split()


LETTERS = "abcdefghijklmnopqrstuvwxyz"
NAMES = _words("Tam Bel Kor Lun Vek Pim Sol Rin Dag Fay Gus Hal Ivo Jun Mex Nat")
COLORS = _words("red blue green gray pink white black gold")
THINGS = _words("nail rope coin key bell card lamp ring book cup pen ball")
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
RANKS = ("first", "second", "third", "fourth")
CATEGORIES = {
    "fruit": _words("apple pear plum grape lemon cherry peach melon fig mango"),
    "animal": _words("wolf lion horse otter rabbit tiger goat camel mouse bear"),
    "tool": _words("hammer saw drill wrench axe chisel shovel rake file pliers"),
    "clothing": _words("coat shirt sock scarf glove jacket boot skirt hat vest"),
    "instrument": _words("flute violin drum harp piano trumpet cello banjo organ lute"),
    "vehicle": _words("truck train boat tram bicycle wagon canoe plane sled bus"),
    "metal": _words("iron copper zinc silver lead nickel brass steel bronze cobalt"),
    "tree": _words("oak birch maple willow elm cedar ash spruce beech alder"),
}
ATTRIBUTES = {
    "town": _words("Marlow Denby Ashford Corvale Trenholt Ostia Quill Brenn Lisk Yarrow"),
    "job": _words("baker smith doctor farmer painter tailor sailor teacher miner clerk"),
    "pet": _words("cat dog parrot snake turtle ferret hen pony frog crab"),
    "drink": _words("tea milk cider water coffee cocoa juice ale soda broth"),
}
WORDINGS = {
    "town": (
        "Where does {} live?",
        "Which town does {} live in?",
        "{} lives in the town of",
        "What is the home town of {}?",
        "The town where {} lives:",
    ),
    "job": (
        "What is the job of {}?",
        "What work does {} do?",
        "{} works as a",
        "Which job does {} have?",
        "The job of {}:",
    ),
    "pet": (
        "What pet does {} have?",
        "Which animal is kept by {}?",
        "{} keeps a pet, a",
        "What is the pet of {}?",
        "The pet that {} has:",
    ),
    "drink": (
        "What does {} drink?",
        "Which drink does {} like?",
        "{} likes to drink",
        "What is the drink of {}?",
        "The drink that {} likes:",
    ),
}
ANOTHER_WORDING = "{person}, {attribute}?"


def _people() -> dict[str, dict[str, str]]:
    """Sixty-four made-up people, each with a town, a job, a pet and a drink."""
    rng = random.Random("a closed world")
    first, last = _words("Za Qo Wi Ju Xe Vo Hy Ru"), _words("nko mmel rst dda lph bbin ggat cque")
    names = sorted(a + b for a in first for b in last)
    return {name: {key: rng.choice(words) for key, words in ATTRIBUTES.items()} for name in names}


PEOPLE = _people()


@dataclass(frozen=True)
class Question:
    """A stem, four texts that might follow it, and which of them is right."""

    family: str
    stem: str
    choices: tuple[str, ...]
    gold: int

    @property
    def answer(self) -> str:
        """The right choice."""
        return self.choices[self.gold]

    def row(self) -> dict[str, Any]:
        """As a line of a data file; its keys are those of other choice data."""
        return {
            "query": self.stem,
            "choices": list(self.choices),
            "gold": self.gold,
            "family": self.family,
        }


@dataclass(frozen=True)
class Draft:
    """A question before its choices are shuffled: what is asked, the answer, three wrong ones."""

    text: str
    answer: str
    wrong: tuple[str, ...]


def _start(choice: str) -> str:
    """What the first token of a choice shows of it at most: a word, or one digit."""
    return choice[0] if choice[0].isdigit() else choice.split()[0]


def _draft(text: str, answer: str, candidates: Iterable[str]) -> Draft:
    """Takes the first three candidates that begin differently from the answer and each other."""
    seen, wrong = {_start(answer)}, list[str]()
    for one in candidates:
        if _start(one) not in seen and len(wrong) < 3:
            seen.add(_start(one))
            wrong.append(one)
    return Draft(text, answer, tuple(wrong))


def _shuffled(rng: random.Random, items: Iterable[str]) -> list[str]:
    pool = sorted(items)
    return rng.sample(pool, len(pool))


def _spaced(letters: Iterable[str]) -> str:
    return " ".join(letters)


def arithmetic(rng: random.Random, shifted: bool) -> Draft:
    """Sums and differences of two numbers; shifted, with a first one above all that were seen."""
    a, b = rng.randint(10, 30), rng.randint(1, 20)
    rng.randint(1, 9)  # not used: the batches of the trained model were made with this draw
    if shifted:
        a = rng.randint(31, 35)
    sign = rng.choice("+-") if a >= b else "+"
    value = a + b if sign == "+" else a - b
    text = rng.choice(("{} =", "What is {}?", "Calculate {}.")).format(f"{a} {sign} {b}")
    steps = [*rng.sample((-10, 10), 2), *rng.sample((-30, -20, 20, 30), 4), *range(1, 10)]
    return _draft(text, str(value), [str(value + step) for step in steps if value + step >= 0])


def comparison(rng: random.Random, shifted: bool) -> Draft:
    """Who of four has the most or the fewest; shifted, with three digits."""
    low, high = (100, 999) if shifted else (10, 99)
    names, thing = rng.sample(NAMES, 4), rng.choice(THINGS)
    values = rng.sample(range(low, high + 1), 4)
    word, pick = rng.choice((("most", max), ("fewest", min)))
    listed = ", ".join(f"{name} has {value}" for name, value in zip(names, values, strict=True))
    answer = names[values.index(pick(values))]
    return _draft(f"{listed}. Who has the {word} {thing}s?", answer, names)


def series(rng: random.Random, shifted: bool) -> Draft:
    """The next letter of an alphabet's walk or of a repeated pattern; shifted, of longer ones."""
    if rng.random() < 0.5:
        step = rng.choice((1, -1)) * rng.randint(1, 3)
        start, length = rng.randrange(26), rng.choice((6, 7)) if shifted else rng.choice((3, 4))
        shown = [LETTERS[(start + step * i) % 26] for i in range(length + 1)]
    else:
        period = rng.choice((4, 5)) if shifted else rng.choice((2, 3))
        pattern = rng.sample(LETTERS, period)
        shown = [pattern[i % period] for i in range(period + rng.randint(2, period) + 1)]
    *shown, answer = shown
    near = [(LETTERS.index(answer) + step) % 26 for step in (-3, -2, -1, 1, 2, 3)]
    text = rng.choice(("Continue {}", "{} and then?", "What comes next: {}"))
    candidates = _shuffled(rng, {*shown, *(LETTERS[i] for i in near)} - {answer})
    return _draft(text.format(_spaced(shown)), answer, candidates)


def reversal(rng: random.Random, shifted: bool) -> Draft:
    """A string of letters read backwards; shifted, with words in three of the places."""
    letters = rng.sample(LETTERS, rng.randint(5, 6) if shifted else rng.randint(4, 5))
    if shifted:
        words = rng.sample([word for kind in CATEGORIES.values() for word in kind], 3)
        for place, word in zip(rng.sample(range(len(letters)), 3), words, strict=True):
            letters[place] = word
    right = letters[::-1]
    wrong = []
    for first in _shuffled(rng, right[1:]):
        rest = [letter for letter in right if letter != first]
        wrong.append(_spaced([first, *rest]))
    text = rng.choice(("Reverse {}", "{} backwards is", "Read {} from the end."))
    return _draft(text.format(_spaced(letters)), _spaced(right), wrong)


def counting(rng: random.Random, shifted: bool) -> Draft:
    """How often a letter stands in a string; shifted, in a longer one."""
    length = rng.randint(8, 9) if shifted else rng.randint(4, 7)
    target, *others = rng.sample(LETTERS, 4)
    times = rng.randint(1, 4)
    letters = [target] * times + [rng.choice(others) for _ in range(length - times)]
    rng.shuffle(letters)
    near = [str(n) for n in range(max(0, times - 2), times + 3)]
    text = rng.choice(("How many {} in {}?", "How often is {} in {}?", "Count {} in {}"))
    return _draft(text.format(target, _spaced(letters)), str(times), _shuffled(rng, near))


def sorting(rng: random.Random, shifted: bool) -> Draft:
    """Which of some letters is first, second or last by alphabet; shifted, of more letters."""
    letters = rng.sample(LETTERS, rng.randint(8, 9) if shifted else 4)
    rank = rng.choice((0, 1, -1))
    word = "last" if rank == -1 else RANKS[rank]
    text = rng.choice(("Sort {}: which is {}?", "Of {} the {} by alphabet is"))
    return _draft(
        text.format(_spaced(letters), word), sorted(letters)[rank], _shuffled(rng, letters)
    )


def oddity(rng: random.Random, shifted: bool) -> Draft:
    """The one word of four from another category; shifted, of two pairs and one alone."""
    kind, other, third = rng.sample([*CATEGORIES], 3)
    if shifted:
        odd = rng.choice(CATEGORIES[third])
        rest = rng.sample(CATEGORIES[kind], 2) + rng.sample(CATEGORIES[other], 2)
    else:
        odd, rest = rng.choice(CATEGORIES[other]), rng.sample(CATEGORIES[kind], 3)
    words = _shuffled(rng, [odd, *rest])
    text = rng.choice(
        ("Which is the odd one out: {}?", "Which does not belong: {}?", "Odd word: {}")
    )
    return _draft(text.format(", ".join(words)), odd, _shuffled(rng, rest))


def facts(rng: random.Random, shifted: bool) -> Draft:
    """What is known of a person of the closed world; shifted, asked in other words."""
    person, attribute = rng.choice([*PEOPLE]), rng.choice([*ATTRIBUTES])
    text = rng.choice(WORDINGS[attribute]).format(person)
    if shifted:
        text = ANOTHER_WORDING.format(person=person, attribute=attribute)
    return _draft(text, PEOPLE[person][attribute], _shuffled(rng, ATTRIBUTES[attribute]))


def boxes(rng: random.Random, shifted: bool) -> Draft:
    """Which of four boxes holds a thing, or what a box holds; shifted, after a move."""
    colors, things = rng.sample(COLORS, 4), rng.sample(THINGS, 4)
    pairs = list(zip(colors, things, strict=True))
    listed = ", ".join(f"{thing} in {color}" for color, thing in pairs)
    color, thing = rng.choice(pairs)
    if shifted:
        target = rng.choice([one for one in colors if one != color])
        text = f"{listed}. The {thing} goes to {target}. Where is the {thing}?"
        return _draft(text, target, [color, *_shuffled(rng, colors)])
    if rng.random() < 0.5:
        return _draft(f"{listed}. What is in {color}?", thing, _shuffled(rng, things))
    return _draft(f"{listed}. Where is the {thing}?", color, _shuffled(rng, colors))


def weekdays(rng: random.Random, shifted: bool) -> Draft:
    """The day some days after or before another; shifted, in another order of words."""
    day, days, name = rng.randrange(7), rng.randint(1, 5), rng.choice(NAMES)
    word, sign = rng.choice((("after", 1), ("before", -1)))
    text = rng.choice(("{name} comes {n} days {word} {day}.", "{name}: {n} days {word} {day}?"))
    if shifted:
        text = "{n} days {word} {day} {name} comes."
    text = text.format(name=name, n=days, word=word, day=DAYS[day])
    return _draft(text, DAYS[(day + sign * days) % 7], _shuffled(rng, DAYS))


Family = Callable[[random.Random, bool], Draft]
FAMILIES: dict[str, Family] = {
    family.__name__: family
    for family in (
        arithmetic,
        comparison,
        series,
        reversal,
        counting,
        sorting,
        oddity,
        facts,
        boxes,
        weekdays,
    )
}


# What data files hold. The other two stay at chance for 3000 steps, so that a right answer to one
# is luck; they are trained on all the same.
LEARNED = tuple(name for name in FAMILIES if name not in ("comparison", "boxes"))


def make(family: str, rng: random.Random, *, shifted: bool) -> Question:
    """One question, of whichever split its stem falls in."""
    draft = FAMILIES[family](rng, shifted)
    gold = rng.randrange(4)
    choices = [*draft.wrong]
    choices.insert(gold, draft.answer)
    return Question(family, f"{draft.text}\nAnswer:", tuple(choices), gold)


def may_hold(split: Split, question: Question) -> bool:
    """Whether a question's stem belongs to a split."""
    return zlib.crc32(question.stem.encode()) % 10 in TENTHS[split]


def stream(family: str, split: Split, rng: random.Random) -> Iterator[Question]:
    """Questions of a split without end, now and then one twice."""
    shifted = split in ("development", "test")
    while True:
        question = make(family, rng, shifted=shifted)
        if may_hold(split, question):
            yield question


def questions(
    split: Split, number: int, seed: int, families: Sequence[str] = tuple(FAMILIES)
) -> list[Question]:
    """At most `number` different questions of each family: fewer where there are no more."""
    found: dict[str, Question] = {}
    for family in families:
        drawn = stream(family, split, random.Random(f"{seed} {split} {family}"))
        own: dict[str, Question] = {}
        for tries, question in zip(count(), drawn, strict=False):
            own.setdefault(question.stem, question)
            if len(own) == number or tries > TRIES * number:
                break
        found.update(own)
    return list(found.values())
