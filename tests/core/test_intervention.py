"""Interventions without a model: addresses, stages, arithmetic, JSON."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import expertmix as em
from expertmix.core.decision import Decision
from expertmix.core.intervention import Stage
from expertmix.core.tokens import Bookkeeper, Pass
from expertmix.errors import (
    ConfigError,
    InterventionError,
    StageError,
    UnknownExpertError,
    UnknownSiteError,
)

SITES = tuple(em.SiteInfo(em.Site(f"model.layers.{i}.mlp"), 6, 2) for i in range(12))
SITE = SITES[7]
SEEDS = st.integers(0, 2**16)


def a_pass(rows=2, columns=5, pads=0) -> Pass:
    ids = torch.arange(1, rows * columns + 1).view(rows, columns)
    real = torch.ones_like(ids, dtype=torch.bool)
    real[0, :pads] = False
    return Bookkeeper().read(ids, real)


def a_decision(tokens, seed=0) -> Decision:
    generator = torch.Generator().manual_seed(seed)
    weights, indices = torch.rand(tokens, 6, generator=generator).softmax(1).topk(2)
    return Decision(indices, weights, 6)


# --- sites --------------------------------------------------------------------------------------


@given(st.from_regex(r"[a-z]+(\.[a-z0-9]+){0,3}", fullmatch=True), st.integers(0, 9))
def test_a_site_reads_what_it_prints(name, step):
    """`Site.parse` is the inverse of `str`, and a bare name is step 0."""
    assert em.Site.parse(str(em.Site(name, step))) == em.Site(name, step)
    assert em.Site.parse(name) == em.Site(name)


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("model.layers.7.mlp", [7]),
        ("layers.7.mlp", [7]),
        ("*.7.mlp", [7]),
        ("model.layers.7.mlp#0", [7]),
        ("*.1?.mlp", [10, 11]),
        ("*.[01].mlp", [0, 1]),
        ("*", list(range(12))),
    ],
)
def test_patterns_match_whole_names_or_their_end(pattern, found):
    """A glob names the whole path or a tail that starts at a dot; order is the model's."""
    targets = em.Ablate(pattern, [0]).targets(SITES)
    assert targets == {SITES[i].site for i in found}


def test_a_pattern_names_a_step():
    """With `#` one step is meant, without it all of them."""
    steps = [em.SiteInfo(em.Site("model.layers.3.mlp", step), 6, 2) for step in range(2)]
    assert em.Ablate("*.3.mlp#1", [0]).targets(steps) == {em.Site("model.layers.3.mlp", 1)}
    assert len(em.Ablate("*.3.mlp", [0]).targets(steps)) == 2


def test_a_pattern_that_matches_nothing_lists_near_names():
    """The error names the nearest sites and says how to list them all."""
    with pytest.raises(UnknownSiteError, match=r"model\.layers\.7\.mlp") as caught:
        em.Mask("model.layer.7.mlp", [0]).targets(SITES)
    assert "12 sites" in str(caught.value)


# --- addresses ----------------------------------------------------------------------------------


def test_padding_is_never_addressed():
    """An edit of every token leaves padding alone."""
    at = a_pass(pads=2)
    assert torch.equal(em.Ablate("*", [0]).addressed(at), at.tokens.real)


def test_negative_positions_count_from_the_end_of_the_prompt():
    """-1 is the last prompt token of each row, also once decoding has gone on."""
    book = Bookkeeper()
    real = torch.tensor([[False, True, True], [True, True, True]])
    prompt = book.read(torch.ones(2, 3, dtype=torch.int64), real)
    step = torch.ones(2, 1, dtype=torch.bool)
    after = book.read(torch.ones(2, 1, dtype=torch.int64), step, past=3)
    last = em.Ablate("*", [0], positions=[-1])
    assert last.addressed(prompt).tolist() == [False, False, True, False, False, True]
    assert not last.addressed(after).any()
    assert em.Ablate("*", [0], positions=[2]).addressed(after).tolist() == [True, False]


@given(SEEDS)
def test_addresses_intersect(seed):
    """Positions, samples and a mask together name the tokens that each of them names."""
    generator = torch.Generator().manual_seed(seed)
    at = a_pass(3, 4)
    positions = torch.randperm(4, generator=generator)[:2].tolist()
    samples = torch.randperm(3, generator=generator)[:2].tolist()
    mask = torch.rand(3, 4, generator=generator) < 0.5
    together = em.Ablate("*", [0], positions=positions, samples=samples, mask=mask)
    brute = [
        position in positions and row in samples and bool(mask[row, position])
        for row in range(3)
        for position in range(4)
    ]
    assert together.addressed(at).tolist() == brute


# --- arithmetic ---------------------------------------------------------------------------------


@given(SEEDS, st.sets(st.integers(0, 5), min_size=1, max_size=6))
def test_ablate_is_a_zero_in_the_table(seed, experts):
    """The table of weights loses the columns of the experts and nothing else."""
    at, decision = a_pass(), a_decision(10, seed)
    edited = em.Ablate("*", sorted(experts)).edit_decision(decision, SITE, at)
    expected = decision.dense()
    expected[:, sorted(experts)] = 0
    assert torch.equal(edited.dense(), expected)
    assert torch.equal(edited.indices, decision.indices)


@given(SEEDS, st.permutations(range(6)))
def test_permuting_experts_permutes_an_edit(seed, order):
    """Renaming experts before or after an ablation is the same."""
    at, decision = a_pass(), a_decision(10, seed)
    place = torch.tensor(order)
    renamed = Decision(place[decision.indices], decision.weights, 6)
    left = em.Ablate("*", [order[2]]).edit_decision(renamed, SITE, at).dense()
    right = em.Ablate("*", [2]).edit_decision(decision, SITE, at).dense()
    assert torch.equal(left[:, place], right)


@given(SEEDS, st.sampled_from(["set", "add", "scale"]), st.booleans())
def test_reweight_scores_by_hand(seed, mode, by_sample):
    """Scores of the named experts are replaced, shifted or scaled for the named samples."""
    generator = torch.Generator().manual_seed(seed)
    at = a_pass()
    scores = torch.rand(10, 6, generator=generator, dtype=torch.float64)
    values = torch.rand(2, 3, generator=generator) if by_sample else torch.rand(3)
    samples = [1, 0] if by_sample else None
    edit = em.Reweight("*", values, "logits", mode=mode, experts=[5, 0, 2], samples=samples)
    got = edit.edit_scores(Stage.LOGITS, scores, SITE, at)
    expected = scores.clone()
    for token in range(10):
        row = values[[1, 0].index(token // 5)] if by_sample else values
        for value, expert in zip(row.double(), (5, 0, 2), strict=True):
            old = scores[token, expert]
            expected[token, expert] = {"set": value, "add": old + value, "scale": old * value}[mode]
    torch.testing.assert_close(got, expected)


@given(SEEDS)
def test_set_weights_is_the_given_table(seed):
    """After `set`, the dense weights are the values; zeros are not called."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(6, generator=generator) * (torch.rand(6, generator=generator) < 0.5)
    edited = em.Reweight("*", values, "weights").edit_decision(a_decision(10), SITE, a_pass())
    assert torch.equal(edited.dense(), values.expand(10, 6))
    assert edited.top_k == max(2, int((values != 0).sum()))


# --- what is refused ----------------------------------------------------------------------------


def test_impossible_edits_are_refused_when_they_are_made():
    """Wrong shapes, stages, modes and addresses are errors before any model is near."""
    with pytest.raises(StageError, match="selection"):
        em.Reweight("*", [1.0], "selection")
    with pytest.raises(InterventionError, match="mode"):
        em.Reweight("*", [1.0], "logits", mode="multiply")
    with pytest.raises(InterventionError, match="samples"):
        em.Reweight("*", [[1.0]], "logits")
    with pytest.raises(InterventionError, match="2 rows of values for 1 samples"):
        em.Reweight("*", [[1.0], [2.0]], "logits", samples=[0])
    with pytest.raises(InterventionError, match="3 values where"):
        em.Reweight("*", [1.0, 2.0, 3.0], "logits").targets(SITES)
    with pytest.raises(UnknownExpertError, match="0 to 5, not 6"):
        em.Reweight("*", [1.0], "logits", experts=[6]).targets(SITES)
    with pytest.raises(InterventionError, match="twice"):
        em.Reweight("*", [1.0, 2.0], "logits", experts=[3, 3])
    for wrong in (["python"], None, 1.5, [True], torch.tensor([1.0])):
        with pytest.raises(ConfigError, match="whole numbers"):
            em.Ablate("*", wrong)
    with pytest.raises(ConfigError, match="rows of the batch"):
        em.Ablate("*", [0], samples=[-1])
    with pytest.raises(ConfigError, match="rows and columns"):
        em.Ablate("*", [0], mask=torch.ones(3))


@pytest.mark.parametrize("stage", ["logits", "probabilities", "weights"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_are_finite(stage, value):
    """NaN and infinity are refused when the edit is made; logits alone may be set to -inf."""
    if stage == "logits" and value == -math.inf:
        em.Reweight("*", [0.0, value], stage)
    else:
        with pytest.raises(InterventionError, match="finite"):
            em.Reweight("*", [0.0, value], stage)


@pytest.mark.parametrize("experts", [np.array([1, 2]), torch.tensor([1, 2]), range(1, 3), {1, 2}])
def test_numbers_come_in_any_container(experts):
    """Arrays, tensors, ranges and sets of whole numbers are all the same address."""
    assert em.Ablate("*", experts).experts == (1, 2)
    assert em.Ablate("*", experts[0] if hasattr(experts, "dtype") else 1).experts == (1,)


@given(SEEDS)
def test_untouched_tokens_keep_their_slots(seed):
    """Where some tokens get more than K experts, the slots of all others stay as they were."""
    decision, values = a_decision(10, seed), torch.rand(6) + 0.1
    edit = em.Reweight("*", values, "weights", samples=[1])
    edited = edit.edit_decision(decision, SITE, a_pass())
    assert edited.top_k == 6
    assert torch.equal(edited.indices[:5, :2], decision.indices[:5])
    assert torch.equal(edited.weights[:5, :2], decision.weights[:5])
    assert not edited.weights[:5, 2:].any()


def test_an_edit_works_where_its_layer_lives():
    """A pass follows the layers to their device: a model may be spread over several."""
    at, meta = a_pass().to(torch.device("meta")), {"device": "meta"}
    decision = Decision(
        torch.zeros(10, 2, dtype=torch.int64, **meta), torch.zeros(10, 2, **meta), 6
    )
    address = {"positions": [-1], "samples": [0], "mask": torch.ones(2, 5)}
    assert em.Ablate("*", [0], **address).edit_decision(decision, SITE, at).weights.is_meta
    assert em.Mask("*", [0], **address).banned(SITE, at).is_meta
    shift = em.Reweight("*", torch.ones(1, 6), "logits", mode="add", **address)
    assert shift.edit_scores(Stage.LOGITS, torch.zeros(10, 6, **meta), SITE, at).is_meta


# --- JSON ---------------------------------------------------------------------------------------

addresses = st.fixed_dictionaries(
    {},
    optional={
        "positions": st.lists(st.integers(-5, 50), max_size=3),
        "samples": st.lists(st.integers(0, 7), min_size=1, max_size=3),
        "mask": st.lists(st.lists(st.booleans(), max_size=4), max_size=3),
    },
)
experts = st.lists(st.integers(0, 5), max_size=4)
edits = st.one_of(
    st.builds(lambda e, a: em.Ablate("*.mlp", e, **a), experts, addresses),
    st.builds(lambda e, a: em.Mask("*.3.mlp", e, **a), experts, addresses),
    st.builds(
        lambda v, m, s, a: em.Reweight("*", v, s, mode=m, **a),
        st.lists(st.floats(-9, 9, width=32), min_size=6, max_size=6),
        st.sampled_from(["set", "add", "scale"]),
        st.sampled_from(["logits", "probabilities", "weights"]),
        addresses,
    ),
)


@given(st.recursive(edits, lambda inner: st.builds(em.InOrder, inner, inner), max_leaves=4))
def test_json_round_trip(edit):
    """What is read back is what was written, in Python and as text."""
    again = em.from_json(edit.to_json())
    assert again == edit
    assert again.to_json() == edit.to_json()


def test_double_precision_survives_json():
    """Values in float64 lose no bit on their way through JSON."""
    edit = em.Reweight("*", torch.tensor([0.1, 1 / 3], dtype=torch.float64), "weights")
    assert em.from_json(edit.to_json()) == edit


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "must be JSON"),
        ('{"kind": "delete"}', "unknown intervention kind 'delete'"),
        ('{"kind": "ablate", "sites": "*", "expert": [1]}', "no key 'expert'"),
        ('{"kind": "ablate", "sites": "*"}', "ablate: "),
        ('{"kind": "in_order", "interventions": [{"kind": "mask", "site": "*"}]}', "no key 'site'"),
        ("[]", "must be an object"),
    ],
)
def test_wrong_json_names_what_is_wrong(text, message):
    """Unknown kinds and keys are named."""
    with pytest.raises(ConfigError, match=message):
        em.from_json(text)


def test_a_replay_is_written_as_a_path(tmp_path):
    """A saved trace is named by its file; an unsaved one cannot be written."""
    from expertmix.testing import tiny_moe

    model = tiny_moe()
    with torch.no_grad(), em.record(model) as trace:
        model(torch.tensor([[3, 4, 5]]))
    with pytest.raises(InterventionError, match="save the trace first"):
        em.Replay(trace).to_json()
    saved = em.Trace.load(trace.save(tmp_path / "t.parquet"))
    again = em.from_json(em.Replay(saved, missing="keep").to_json())
    assert json.loads(again.to_json()) == json.loads(em.Replay(saved, missing="keep").to_json())
