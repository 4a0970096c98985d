"""Poison works where nothing defends, and each defense keeps what it promises."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from expertmix.errors import ConfigError, FingerprintError
from expertmix.optimize.aggregate import Aggregate
from expertmix.optimize.attack import damage
from expertmix.optimize.descent import NGD
from expertmix.optimize.neighbors import Neighbors, find
from expertmix.optimize.poison import Poison, audit, poison
from expertmix.optimize.reference import ReferenceSet
from expertmix.optimize.regression import KernelRegression, Search
from expertmix.optimize.remix import Remix, remix
from expertmix.optimize.samples import Sample

from .world import FakePathways, topical

NEAR = Neighbors(k=3, ngram=None, max_similarity=None)
CLOSE = 0.999
DESCENT = NGD(steps=15, lr=0.5, core=None)


def planted() -> tuple[FakePathways, ReferenceSet, list[Sample]]:
    """A model that is right, its references, and victims: option 20 is right in every topic."""
    pathways = FakePathways(top_k=6, pull=0.9)
    return pathways, ReferenceSet.build(pathways, topical(24, seed=1)), topical(3, seed=2)


def embedded(pathways: FakePathways, reference: ReferenceSet, asked: list[Sample]) -> Tensor:
    return reference.embed(pathways.read([one.question for one in asked]))


def run(
    pathways: FakePathways, reference: ReferenceSet, asked: list[Sample], **settings: object
) -> Remix:
    method = settings.pop("method", DESCENT)
    return remix(pathways, asked, reference, method, neighbors=NEAR, **settings)  # type: ignore[arg-type]


def right(found: Remix) -> int:
    return sum(bool(one.correct["hard"]) for one in found.outcomes)


def test_poison_takes_the_neighborhood_and_flips_answers() -> None:
    """Three crafted references per victim are all its neighbors, and turn every right answer."""
    pathways, reference, victims = planted()
    clean = run(pathways, reference, victims)
    assert right(clean) == len(victims)
    bad = poison(reference, embedded(pathways, reference, victims), Poison(3, "label", CLOSE))
    found = damage(clean, run(pathways, bad.reference, victims), bad.hostile)
    assert found.hostile == pytest.approx(1)
    assert found.flipped == found.hijacked == len(victims)


def test_poisoned_pathways_pull_kernel_regression() -> None:
    """Where α is not searched, crafted pathways are where kernel regression goes."""
    pathways, reference, victims = planted()
    bad = poison(reference, embedded(pathways, reference, victims), Poison(3, "pathway", CLOSE))
    method = KernelRegression(Search(alpha=0.0))
    clean = run(pathways, reference, victims, method=method)
    attacked = run(pathways, bad.reference, victims, method=method)
    assert right(attacked) < right(clean)


def test_true_references_keep_their_numbers() -> None:
    """Poison only adds, and leaves the set that it was given alone."""
    pathways, reference, victims = planted()
    bad = poison(reference, embedded(pathways, reference, victims), Poison(2))
    assert len(bad.reference) == len(reference) + 2 * len(victims)
    assert bad.hostile == frozenset(range(len(reference), len(bad.reference)))
    assert torch.equal(bad.reference.start[: len(reference)], reference.start)
    assert bad.reference.samples[: len(reference)] == reference.samples
    assert not poison(reference, embedded(pathways, reference, victims), Poison(0)).hostile


@pytest.mark.parametrize("aggregate", ["median", "trimmed"])
def test_a_median_resists_one_poisoned_neighbor_of_three(aggregate: Aggregate) -> None:
    """With one crafted neighbor of three, the mean is led astray on more victims than a median."""
    pathways, reference, victims = planted()
    bad = poison(reference, embedded(pathways, reference, victims), Poison(1, "label", CLOSE))
    even = replace(NEAR, kernel="linear")  # the nearest does not have half of the weight
    near = find(embedded(pathways, reference, victims), bad.reference, even)
    hostile = torch.isin(near.indices, torch.tensor(sorted(bad.hostile)))
    assert hostile.sum(1).tolist() == [1] * len(victims)
    runs = [
        remix(pathways, victims, bad.reference, method, neighbors=even)
        for method in (replace(DESCENT, aggregate=aggregate, trim=0.4), DESCENT)
    ]
    robust, mean = (
        torch.stack([one.hard[0] - one.hard[1] for one in found.outcomes]) for found in runs
    )
    assert (robust > mean).all()
    assert right(runs[0]) == len(victims)


def test_near_duplicates_do_not_help_the_attacker() -> None:
    """A crafted reference that is too near is left out like any near-duplicate."""
    pathways, reference, victims = planted()
    victim = embedded(pathways, reference, victims)
    bad = poison(reference, victim, Poison(3, similarity=CLOSE))
    kept = find(victim, bad.reference, replace(NEAR, max_similarity=0.95))
    bare = find(victim, bad.reference, NEAR)
    hostile = torch.tensor(sorted(bad.hostile))
    assert not torch.isin(kept.indices, hostile).any()
    assert torch.isin(bare.indices, hostile).all()


def test_an_audit_finds_all_that_is_crafted_and_nothing_else() -> None:
    """Crafted references are not what the model makes of their questions; true ones are."""
    pathways, reference, victims = planted()
    bad = poison(reference, embedded(pathways, reference, victims), Poison(2, "label"))
    assert audit(pathways, bad.reference) == sorted(bad.hostile)
    assert audit(pathways, bad.reference, [0, 3]) == []
    assert audit(pathways, reference) == []


def test_references_of_another_model_are_refused() -> None:
    """Whose pathways another model made is no reference set here."""
    _, reference, victims = planted()
    with pytest.raises(FingerprintError):
        run(FakePathways(top_k=6, pull=0.9, seed=1), reference, victims)


def test_seeds_decide() -> None:
    """The same seed crafts the same references, another one others."""
    pathways, reference, victims = planted()
    victim = embedded(pathways, reference, victims)
    one, same, other = (
        poison(reference, victim, Poison(1, seed=seed)).reference.embeddings for seed in (0, 0, 1)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    "settings", [{"count": -1}, {"aim": "money"}, {"similarity": 1.5}], ids=str
)
def test_impossible_poison_is_refused(settings: dict[str, object]) -> None:
    """With what and where."""
    with pytest.raises(ConfigError, match=next(iter(settings))):
        Poison(**settings)  # type: ignore[arg-type]
