from __future__ import annotations

import importlib
import json
import random
import re
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
SPLITS = {"train": False, "reference": False, "development": True, "test": True}


def example(name: str) -> ModuleType:
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


choices = example("choice_families")
trainer = example("train_choice_moe")


@pytest.fixture(scope="module")
def splits() -> dict[str, list[Any]]:
    return {split: choices.questions(split, 80, 3) for split in SPLITS}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return trainer.build_tokenizer(0)


def drawn(family: str, shifted: bool, number: int = 300) -> list[Any]:
    rng = random.Random(f"{family} {shifted}")
    return [choices.make(family, rng, shifted=shifted) for _ in range(number)]


# The right answers again, from nothing but the stem.


def arithmetic(text: str) -> str:
    terms = re.findall(r"([+-]?) ?(\d+)", text)
    return str(sum(-int(n) if sign == "-" else int(n) for sign, n in terms))


def comparison(text: str) -> str:
    owned = {int(n): name for name, n in re.findall(r"(\w+) has (\d+)", text)}
    return owned[max(owned) if "most" in text else min(owned)]


def letters(text: str) -> list[str]:
    return re.findall(r"\b[a-z]\b", text)


def series(text: str) -> str:
    shown = [ord(one) - ord("a") for one in letters(text)]
    steps = {(b - a) % 26 for a, b in pairwise(shown)}
    if len(steps) == 1:
        return chr((shown[-1] + steps.pop()) % 26 + ord("a"))
    period = next(p for p in range(2, 9) if shown[p:] == shown[:-p])
    return chr(shown[-period] + ord("a"))


def reversal(text: str) -> str:
    listed = re.sub("Reverse|backwards is|Read|from the end.", "", text).split()
    return " ".join(reversed(listed))


def counting(text: str) -> str:
    target, *rest = letters(text)
    return str(sum(one == target for one in rest))


def sorting(text: str) -> str:
    ordered = sorted(letters(text))
    return ordered[{"first": 0, "second": 1, "last": -1}[re.findall("first|second|last", text)[0]]]


def oddity(text: str) -> str:
    kinds = {word: kind for kind, words in choices.CATEGORIES.items() for word in words}
    listed = [word for word in re.findall(r"\w+", text.partition(":")[2]) if word in kinds]
    sizes = Counter(kinds[word] for word in listed)
    (alone,) = [word for word in listed if sizes[kinds[word]] == 1]
    return alone


def facts(text: str) -> str:
    (person,) = [name for name in choices.PEOPLE if re.search(rf"\b{name}\b", text)]
    words = {
        "town": "live|town", "job": "job|work", "pet": "pet|animal", "drink": "drink",
    }  # fmt: skip
    (attribute,) = [key for key, pattern in words.items() if re.search(pattern, text)]
    return choices.PEOPLE[person][attribute]


def boxes(text: str) -> str:
    place = dict(re.findall(r"(\w+) in (\w+)", text.partition(".")[0]))
    place |= dict(re.findall(r"(\w+) goes to (\w+)", text))
    if asked := re.search(r"Where is the (\w+)", text):
        return place[asked[1]]
    color = re.search(r"What is in (\w+)", text)[1]
    return next(thing for thing, where in place.items() if where == color)


def weekdays(text: str) -> str:
    n, word, day = re.search(r"(\d+) days (after|before) (\w+day)", text).groups()
    at = choices.DAYS.index(day)
    for _ in range(int(n)):
        at += 1 if word == "after" else -1
    return choices.DAYS[at % 7]


@pytest.mark.parametrize("shifted", [False, True], ids=["plain", "shifted"])
@pytest.mark.parametrize("family", choices.FAMILIES)
def test_the_gold_answer_is_right(family: str, shifted: bool) -> None:
    """Whoever solves the stem by other means finds the gold choice, and only that one."""
    solve = globals()[family]
    for question in drawn(family, shifted):
        assert question.stem.endswith("\nAnswer:")
        solved = solve(question.stem.removesuffix("\nAnswer:"))
        assert [solved == choice for choice in question.choices].index(True) == question.gold
        assert question.answer == solved


@pytest.mark.parametrize("shifted", [False, True], ids=["plain", "shifted"])
@pytest.mark.parametrize("family", choices.FAMILIES)
def test_choices_begin_differently(tokenizer: Any, family: str, shifted: bool) -> None:
    """Four choices, no two of which begin with the same token of the trained tokenizer."""
    for question in drawn(family, shifted, 60):
        assert len({tokenizer(f" {choice}")["input_ids"][0] for choice in question.choices}) == 4


def test_stem_and_answer_meet_at_a_token(tokenizer: Any, splits: dict[str, list[Any]]) -> None:
    """Tokens of stem + answer are those of the stem, then those of the answer; they decode."""
    for question in splits["train"] + splits["test"]:
        whole = tokenizer(f"{question.stem} {question.answer}")["input_ids"]
        parts = [tokenizer(text)["input_ids"] for text in (question.stem, f" {question.answer}")]
        assert whole == parts[0] + parts[1]
        assert tokenizer.decode(whole) == f"{question.stem} {question.answer}"


@pytest.mark.parametrize("shifted", [False, True], ids=["plain", "shifted"])
def test_the_gold_place_is_uniform(shifted: bool) -> None:
    """Each of the four places holds the answer equally often, to four standard deviations."""
    asked = [one for family in choices.FAMILIES for one in drawn(family, shifted)]
    expected = len(asked) / 4
    for times in Counter(one.gold for one in asked).values():
        assert abs(times - expected) < 4 * (expected * 0.75) ** 0.5


def test_a_seed_fixes_everything(tokenizer: Any) -> None:
    """The same seed gives the same questions and batches, another seed others."""
    again = [choices.questions("reference", 20, seed) for seed in (5, 5, 6)]
    assert again[0] == again[1] != again[2]
    settings = [trainer.Settings(**{**trainer.QUICK, "seed": seed}) for seed in (5, 5, 6)]
    ids = [trainer.batch_at(tokenizer, 1, one)[0] for one in settings]
    assert torch.equal(ids[0], ids[1])
    assert not torch.equal(ids[0], ids[2])


def test_splits_share_no_stem(splits: dict[str, list[Any]]) -> None:
    """No stem stands twice, in one split or in two; every family has rows in each."""
    stems = [one.stem for rows in splits.values() for one in rows]
    assert len(set(stems)) == len(stems)
    for rows in splits.values():
        assert min(Counter(one.family for one in rows).values()) == 80
        assert {one.family for one in rows} == set(choices.FAMILIES)


@pytest.mark.parametrize("family", choices.FAMILIES)
def test_shifted_questions_are_none_of_the_plain_ones(family: str) -> None:
    """However long both versions are drawn from, they never meet."""
    plain, shifted = ({one.stem for one in drawn(family, s, 2000)} for s in (False, True))
    assert not plain & shifted


def test_training_documents_hold_training_stems_only() -> None:
    """What a batch is made of belongs to the training split: nothing that measures is in it."""
    rng = random.Random(0)
    for _ in range(200):
        pieces = list(trainer.document(rng))
        for (stem, _), (answer, is_answer) in zip(pieces[::2], pieces[1::2], strict=True):
            question = choices.Question("", stem.removeprefix("\n\n"), (answer,), 0)
            assert is_answer
            assert choices.may_hold("train", question)
            assert not choices.may_hold("reference", question)


def test_only_answers_weigh_fully(tokenizer: Any) -> None:
    """Of a batch, the tokens of weight 1 are the answers, and padding weighs nothing."""
    settings = trainer.Settings(**trainer.QUICK)
    ids, weights = trainer.batch_at(tokenizer, 0, settings)
    assert weights.unique().tolist() == pytest.approx([0.0, settings.stem_weight, 1.0])
    assert torch.equal(weights == 0, ids == tokenizer.pad_token_id)
    text = tokenizer.decode(ids[0])
    answers = re.findall(r"Answer:(.*?)(?=\n|<)", text)
    assert tokenizer.decode(ids[0][weights[0] == 1]) == "".join(answers)


# Training, on the quick settings.


def quick(folder: Path, *words: str) -> None:
    trainer.main(["--quick", "--out", str(folder / "out"), "--work", str(folder), *words])


def test_a_quick_run_writes_a_folder_that_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Model, tokenizer and data files load; a table of every family is printed."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quick(tmp_path)
    out = tmp_path / "out"
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert model.config.model_type == "olmoe"
    state = torch.load(tmp_path / "training.pt", weights_only=True)["model"]
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    for split in ("reference", "development", "test"):
        rows = [json.loads(line) for line in (out / f"{split}.jsonl").read_text().splitlines()]
        assert Counter(row["family"] for row in rows) == dict.fromkeys(choices.LEARNED, 4)
        assert set(rows[0]) == {"query", "choices", "gold", "family"}
        assert tokenizer.decode(tokenizer(rows[0]["query"])["input_ids"]) == rows[0]["query"]
    table = capsys.readouterr().out.splitlines()[-len(choices.LEARNED) - 2 :]
    assert [line.split()[0] for line in table] == ["family", *choices.LEARNED, "all"]


def test_a_killed_run_goes_on_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run killed between two saves and started again ends bit for bit like an unbroken one."""
    settings = trainer.Settings(**trainer.QUICK)
    whole = trainer.Run(settings, tmp_path / "whole.pt")
    trainer.train(whole)
    broken = trainer.Run(settings, tmp_path / "broken.pt")
    with monkeypatch.context() as patch:
        patch.setattr(broken, "train_step", dying(broken, settings.save_every + 1))
        with pytest.raises(KeyboardInterrupt):
            trainer.train(broken)
    again = trainer.Run(settings, tmp_path / "broken.pt")
    assert again.step == settings.save_every
    trainer.train(again)
    ends = whole.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    assert again.losses == whole.losses


def dying(run: Any, last: int) -> Any:
    """The run's step, which does not come back from the last one."""
    step = run.train_step

    def die() -> float:
        loss: float = step()
        if run.step == last:
            raise KeyboardInterrupt
        return loss

    return die


def test_the_state_of_another_run_is_refused(tmp_path: Path) -> None:
    """A run does not go on from a state that was made with another seed."""
    settings = trainer.Settings(**{**trainer.QUICK, "steps": 2})
    trainer.train(trainer.Run(settings, tmp_path / "training.pt"))
    with pytest.raises(SystemExit, match="another --work"):
        trainer.Run(trainer.Settings(**{**trainer.QUICK, "seed": 1}), tmp_path / "training.pt")


def test_likelihoods_are_those_of_each_choice_alone(tokenizer: Any) -> None:
    """Scores in a padded batch are those of one unpadded sequence after the other."""
    settings = trainer.Settings(**trainer.QUICK)
    model = trainer.build_model(settings, tokenizer).train(False)
    part = choices.questions("test", 1, 0)
    for question, row in zip(part, trainer.log_likelihoods(model, tokenizer, part), strict=True):
        for choice, value in zip(question.choices, row, strict=True):
            stem = tokenizer(question.stem, return_tensors="pt")["input_ids"]
            end = tokenizer(f" {choice}", return_tensors="pt")["input_ids"]
            logs = model(input_ids=torch.cat([stem, end], 1)).logits.log_softmax(-1)[0]
            places = range(stem.shape[1] - 1, stem.shape[1] + end.shape[1] - 1)
            alone = sum(logs[at, token] for at, token in zip(places, end[0], strict=True))
            torch.testing.assert_close(value, alone, atol=1e-4, rtol=1e-4)
