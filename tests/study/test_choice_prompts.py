from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from expertmix.errors import ConfigError, ContextLengthError
from expertmix.optimize.oracle import WrongOracle
from expertmix.study.choice import Item
from expertmix.study.choice_files import read_items
from expertmix.study.choice_prompts import Style, ask, ask_references, item_scores
from expertmix.testing import tiny_tokenizer

from .choosing import data, item


def text_of(tokenizer, ids):
    return tokenizer.decode(list(ids))


@pytest.fixture(scope="module")
def tokenizer():
    """One token per character."""
    return tiny_tokenizer()


def test_options_follow_the_prompt(tokenizer):
    """Text style: prompt and option are the tokens of the whole text, a blank between them."""
    (asked,) = ask([item(7, gold=2)], tokenizer, Style())
    question = asked.sample.question
    assert text_of(tokenizer, question.prompt) == "Question: what is 7?\nAnswer:"
    assert [text_of(tokenizer, one) for one in question.options] == [
        " answer a7", " answer b7", " answer c7",
    ]  # fmt: skip
    assert (asked.sample.gold, asked.order, asked.merged) == (2, (0, 1, 2), False)
    assert asked.sample.name == "item-7"
    assert asked.sample.text == "Question: what is 7?\nAnswer:"


def test_letters_are_asked_in_every_cyclic_shift(tokenizer):
    """Each option stands at each place once; the right one is found again."""
    asked = ask([item(7, gold=1)], tokenizer, Style("letters"))
    assert [one.order for one in asked] == [(0, 1, 2), (1, 2, 0), (2, 0, 1)]
    assert [one.sample.gold for one in asked] == [1, 0, 2]
    assert [one.sample.name for one in asked] == ["item-7", "item-7#1", "item-7#2"]
    assert text_of(tokenizer, asked[1].sample.question.prompt) == (
        "Question: what is 7?\nA. answer b7\nB. answer c7\nC. answer a7\nAnswer:"
    )
    letters = [text_of(tokenizer, one) for one in asked[1].sample.question.options]
    assert letters == [" A", " B", " C"]
    assert len(ask([item(7)], tokenizer, Style("letters", permute=False))) == 1


def test_a_wrong_oracle_pushes_one_text_in_every_shift(tokenizer):
    """Whatever letter it has there."""
    for number in range(8):
        asked = ask([item(number, gold=1, options=4)], tokenizer, Style("letters"))
        pushed = {one.order[WrongOracle().target(one.sample)] for one in asked}
        assert len(asked) == 4
        assert len(pushed) == 1
        assert pushed != {1}
    assert len(ask([item(7)], tokenizer, Style("text"))) == 1


def test_a_liking_for_a_letter_cancels(tokenizer):
    """Scores that know only the place are equal for all options after averaging."""
    asked = ask([item(1), item(2, options=4)], tokenizer, Style("letters"))
    liking = [0.5, -1.0, 2.0, 0.25]
    found = item_scores(asked, [liking] * len(asked))
    assert [len({round(score, 12) for score in scores}) for scores in found.values()] == [1, 1]


def test_scores_come_back_in_the_items_order(tokenizer):
    """Permuting the options changes the order, and nothing but the order."""
    asked = ask([item(3)], tokenizer, Style("letters"))
    known = [-1.0, -2.0, -3.0]
    shown = [[known[number] for number in one.order] for one in asked]
    assert item_scores(asked, shown) == {0: known}


@pytest.mark.parametrize(
    ("units", "expected"), [("none", ()), ("tokens", (10, 2)), ("characters", (9, 1))]
)
def test_units_are_those_of_the_option(tokenizer, units, expected):
    """Characters of the option as written; tokens with the blank before it."""
    (asked,) = ask([item(1, choices=("two words", "x"))], tokenizer, Style(units=units))
    assert asked.sample.units == expected


def test_a_long_item_is_named(tokenizer):
    """Prompt and longest option must fit the context; just fitting is allowed."""
    long = item(4, choices=("a", "b" * 20))
    length = len("Question: what is 4?\nAnswer:") + 21
    assert ask([long], tokenizer, Style(), context=length)
    with pytest.raises(ContextLengthError, match=r"items.jsonl:4: item 'item-4' has a prompt of"):
        ask([item(1), long], tokenizer, Style(), context=length - 1)


def test_references_hide_the_place_of_the_right_answer(tokenizer):
    """Shifts come from the seed, one per item, whatever other items there are."""
    items = [item(n, options=4, gold=0) for n in range(40)]
    first = ask_references(items, tokenizer, Style("letters"), seed=1)
    assert len(first) == 40
    assert {one.sample.gold for one in first} == {0, 1, 2, 3}
    assert [one.sample.name for one in first] == [item.name for item in items]
    alone = ask_references(items[9:10], tokenizer, Style("letters"), seed=1)
    assert alone[0].sample == first[9].sample
    assert first != ask_references(items, tokenizer, Style("letters"), seed=2)


def test_free_texts_have_one_option(tokenizer):
    """Nothing to choose: style letters refuses them; a line break before an answer stays."""
    code = Item("def f(x):\n", ("    return x",), 0, name="f", where="f:1", free=True)
    (asked,) = ask([code], tokenizer, Style())
    assert text_of(tokenizer, asked.sample.question.options[0]) == "    return x"
    with pytest.raises(ConfigError, match="use style text"):
        ask([code], tokenizer, Style("letters"))


@pytest.mark.parametrize(
    "wrong", [{"name": "words"}, {"units": "bytes"}]
)  # fmt: skip
def test_unknown_styles_are_refused(wrong):
    """With what there is."""
    with pytest.raises(ConfigError, match=r"text, letters|none, tokens, characters"):
        Style(**wrong)


def greedy(vocabulary: list[str], begin: bool = False, end: bool = False):
    """A tokenizer that knows some words and single characters, and takes the longest."""
    pieces = ["<unk>", "<s>", "</s>", *vocabulary]
    numbers = {piece: number for number, piece in enumerate(pieces)}
    core = Tokenizer(
        models.WordPiece(vocab=numbers, unk_token="<unk>", continuing_subword_prefix="")
    )
    core.pre_tokenizer = pre_tokenizers.Split("|", "isolated")
    if begin or end:
        template = f"{'<s> ' if begin else ''}$A{' </s>' if end else ''}"
        core.post_processor = processors.TemplateProcessing(
            template, special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


CHARACTERS = list("abcdefghijklmnopqrstuvwxyzQ?: \nA")


def test_merging_across_the_boundary_is_undone_and_counted():
    """Where a token would hold the prompt's end, every option is tokenized alone."""
    tokenizer = greedy([*CHARACTERS, ": a"])
    split = item(1, query="Q", choices=("aa", "bb"))
    (asked,) = ask([split], tokenizer, Style())
    plain = greedy(CHARACTERS)
    (unmerged,) = ask([split], plain, Style())
    assert (asked.merged, unmerged.merged) == (True, False)
    prompt, *options = asked.sample.question.prompt, *asked.sample.question.options
    pieces = [tokenizer.convert_ids_to_tokens(list(ids)) for ids in (prompt, *options)]
    assert "".join(pieces[0]) == "Q\nAnswer:"
    assert ["".join(one) for one in pieces[1:]] == [" aa", " bb"]


@pytest.mark.parametrize("begin", [False, True])
@pytest.mark.parametrize("end", [False, True])
def test_special_tokens_begin_a_prompt_and_never_end_it(begin, end):
    """What a tokenizer puts behind a text would stand between prompt and option."""
    tokenizer = greedy(CHARACTERS, begin, end)
    (asked,) = ask([item(1, query="Q", choices=("aa", "bb"))], tokenizer, Style())
    question = asked.sample.question
    assert (question.prompt[0] == 1) == begin
    assert 2 not in (*question.prompt, *question.options[0])
    assert not asked.merged


@pytest.mark.parametrize("style", ["text", "letters"])
@pytest.mark.parametrize("name", ["arc_easy", "piqa", "siqa", "commonsense_qa", "openbook_qa"])
def test_public_sets_are_asked_without_merging(name, style):
    """Under the default model's tokenizer, prompt and option meet where tokens do."""
    from expertmix.study.loading import load_tokenizer

    tokenizer = load_tokenizer("default")
    items = read_items(data(f"choice/{name}.jsonl"))[:50]
    asked = ask(items, tokenizer, Style(style))
    assert not any(one.merged for one in asked)
    for one in asked:
        question = one.sample.question
        whole = tokenizer.decode([*question.prompt, *question.options[one.sample.gold]])
        right = items[one.item].choices[items[one.item].gold]
        assert whole.endswith(right if style == "text" else f"Answer: {'ABCDE'[one.sample.gold]}")
