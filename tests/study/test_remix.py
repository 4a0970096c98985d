from __future__ import annotations

import pytest
import torch

import expertmix as em
from expertmix.bindings.pathways import open_pathways
from expertmix.errors import ConfigError, FingerprintError, NoSitesError
from expertmix.optimize.samples import scores
from expertmix.testing import tiny_lm, tiny_moe


def sample(number: int, gold: int | None = 0) -> em.Sample:
    prompt = (number + 40, 5, number + 7, 13, number + 9)[: 3 + number % 3]
    return em.Sample(em.Question(prompt, ((30, 31), (32,), (33, 34))), gold, name=f"s{number}")


@pytest.fixture(scope="module")
def model():
    return tiny_moe("olmoe")


@pytest.fixture(scope="module")
def reference(model):
    """A third of the samples is answered right, whatever the model says."""
    solved = [sample(number, gold) for number in range(12) for gold in range(3)]
    return em.references(model, solved, layers="last 2")


ASKED = [sample(number, None) for number in range(20, 24)]


def batch_of(samples) -> dict[str, torch.Tensor]:
    """Prompts padded in front."""
    prompts = [one.question.prompt for one in samples]
    width = max(map(len, prompts))
    ids = [[0] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    real = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(real)}


def whole_scores(model, better, number: int) -> torch.Tensor:
    """(O,) log-probabilities of a sample's options under its intervention."""
    question = better.outcomes[number].sample.question
    length = len(question.prompt)
    rows = [[*question.prompt, *ids] for ids in question.options]
    real = torch.tensor([[1] * len(row) + [0] * (length + 2 - len(row)) for row in rows])
    ids = torch.tensor([row + [0] * (length + 2 - len(row)) for row in rows])
    with torch.no_grad(), em.record(model, better.intervention([number], options=True)):
        logprobs = model(input_ids=ids, attention_mask=real).logits.log_softmax(-1)
    found = [
        sum(logprobs[row, length - 1 + n, token] for n, token in enumerate(option))
        for row, option in enumerate(question.options)
    ]
    return torch.stack(found)


def test_a_remix_is_an_intervention_on_the_same_batch(model, reference):
    """At the last prompt token of each row its critical sites route as found; nowhere else."""
    better = em.remix(model, ASKED, reference, "ngd steps=3")
    inputs = batch_of(ASKED)
    with em.record(model) as before:
        model(**inputs)
    with em.record(model, better.intervention()) as after:
        model(**inputs)
    real = after.tokens.real
    last = real & (
        after.tokens.position == inputs["attention_mask"].sum(1)[after.tokens.sample] - 1
    )
    for info in em.sites(model):
        old, new = before[info.site].dense(), after[info.site].dense()
        critical = info.site in [one.site for one in reference.meta.sites]
        assert torch.equal(old[real & ~last], new[real & ~last]) or critical
        assert torch.equal(old[last], new[last]) != critical
    first = reference.meta.sites[0].site
    assert torch.equal(before[first].dense()[real & ~last], after[first].dense()[real & ~last])


def test_scores_are_those_of_the_whole_model(model, reference):
    """What an outcome says of its options, the model says under the intervention (to 1e-5)."""
    better = em.remix(model, ASKED, reference, "ngd steps=3")
    for number, outcome in enumerate(better.outcomes):
        assert outcome.changed
        assert torch.allclose(whole_scores(model, better, number), outcome.hard, atol=1e-5)


def test_no_steps_is_the_base_bit_for_bit(model, reference):
    """Nothing is edited, and scores are the plain pass's own."""
    better = em.remix(model, ASKED, reference, "ngd steps=0")
    assert better.intervention().parts() == ()
    for outcome in better.outcomes:
        assert torch.equal(outcome.base, outcome.hard)
        assert torch.equal(outcome.base, outcome.dense)


def test_tokenized_prompts_are_samples_without_options(model, reference):
    """The same routing as of samples; on which side a batch is padded does not matter."""
    better = em.remix(model, ASKED, reference, "kernel_regression alpha=0")
    left = batch_of(ASKED)
    width = left["input_ids"].shape[1]
    rows = [list(one.question.prompt) for one in ASKED]
    right = {
        "input_ids": torch.tensor([row + [0] * (width - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows]),
    }
    for inputs in (left, right):
        other = em.remix(model, inputs, reference, {"kind": "kernel_regression", "alpha": 0})
        for one, two in zip(better.outcomes, other.outcomes, strict=True):
            assert torch.allclose(one.values.exp(), two.values.exp(), atol=1e-6)


def test_the_model_is_as_it_was(model, reference):
    """No hook, no change of output; a caller may be without gradients, or in inference mode."""
    inputs = batch_of(ASKED)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            before = model(**inputs).logits
            em.remix(model, ASKED, reference)
            assert torch.equal(model(**inputs).logits, before)


def test_what_cannot_be_remixed_is_told(model, reference):
    """Another model, a dense one, other layers, no samples, no tokens, no such method."""
    with pytest.raises(FingerprintError, match="another model"):
        em.remix(tiny_moe("olmoe", seed=1), ASKED, reference)
    with pytest.raises(NoSitesError):
        em.remix(tiny_lm("llama"), ASKED, reference)
    with pytest.raises(NoSitesError):
        em.references(tiny_lm("llama"), ASKED)
    with pytest.raises(ConfigError, match="other critical sites"):
        em.remix(model, ASKED, reference, layers="last 1")
    with pytest.raises(ConfigError, match="no samples"):
        em.remix(model, [], reference)
    with pytest.raises(ConfigError, match="input_ids"):
        em.remix(model, {"ids": 1}, reference)
    empty = {"input_ids": torch.ones(1, 2), "attention_mask": torch.zeros(1, 2)}
    with pytest.raises(ConfigError, match="row 0 of the inputs is padding only"):
        em.remix(model, empty, reference)
    with pytest.raises(ConfigError, match="did you mean 'ngd'"):
        em.remix(model, ASKED, reference, "ndg")
    with pytest.raises(ConfigError, match="needs the labels"):
        em.remix(model, ASKED, reference, "oracle")


def test_references_are_saved_and_loaded(model, reference, tmp_path):
    """A folder gives what memory gave."""
    solved = [sample(number, gold) for number in range(12) for gold in range(3)]
    em.references(model, solved, layers="last 2", to=tmp_path / "set")
    again = em.ReferenceSet.load(tmp_path / "set")
    one, two = (em.remix(model, ASKED, known, "ngd steps=2") for known in (reference, again))
    for a, b in zip(one.outcomes, two.outcomes, strict=True):
        assert torch.equal(a.hard, b.hard)


def test_a_sample_alone_scores_as_in_a_batch(model, reference):
    """To rounding: others in its batch do not matter."""
    together = em.remix(model, ASKED, reference, "ngd steps=3")
    for number, one in enumerate(ASKED):
        alone = em.remix(model, [one], reference, "ngd steps=3").outcomes[0]
        assert torch.allclose(alone.hard, together.outcomes[number].hard, atol=1e-4)
        assert alone.base.shape == scores(torch.zeros(1, 3, 2), [one])[0].shape


@pytest.mark.parametrize("method", ["ngd steps=3", "ngd steps=3 parameter=add"])
def test_scored_tokens_are_routed_as_the_prompt_ends(model, reference, method):
    """With the same references; scores are those of the whole model (to 1e-5)."""
    better = em.remix(model, ASKED, reference, method, scored=True)
    assert better.scored
    for number, outcome in enumerate(better.outcomes):
        assert torch.allclose(whole_scores(model, better, number), outcome.hard, atol=1e-5)
    plain = em.remix(model, ASKED, reference, method)
    assert any(
        not torch.equal(a.hard, b.hard)
        for a, b in zip(plain.outcomes, better.outcomes, strict=True)
    )


def test_references_serve_scored_tokens_as_they_are(model, reference):
    """Built with the options' tokens as decision tokens, a set is the same, bit for bit."""
    with open_pathways(model, layers="last 2", scored=True) as pathways:
        samples = [sample(number, gold) for number in range(12) for gold in range(3)]
        other = em.ReferenceSet.build(pathways, samples)
    assert other.samples == reference.samples
    for name in ("embeddings", "start", "mass"):
        assert torch.equal(getattr(other, name), getattr(reference, name))
    for number in range(len(other)):
        mine, theirs = reference.state(number), other.state(number)
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
