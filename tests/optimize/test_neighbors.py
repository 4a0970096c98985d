"""Who is similar."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import normalize

from expertmix.core.pathway import Question
from expertmix.errors import ConfigError, MissingDependencyError
from expertmix.optimize.kernels import Linear
from expertmix.optimize.neighbors import Finder, Neighbors, find
from expertmix.optimize.reference import ReferenceSet
from expertmix.optimize.reference_meta import ReferenceMeta
from expertmix.optimize.samples import Sample
from expertmix.optimize.search import Index

METRICS = ["standardized cosine", "centered cosine", "cosine", "euclidean"]


def reference(embeddings) -> ReferenceSet:
    """References that have embeddings, and prompts of their own."""
    count = len(embeddings)
    samples = [Sample(Question((1000 + number,), ((4,), (5,))), 0) for number in range(count)]
    meta = ReferenceMeta("model", (), 1, True, "mean", False, count, count)
    empty = torch.zeros(count, 1, 1, 4)
    return ReferenceSet(
        meta, samples, embeddings, empty, empty[..., 0], [torch.zeros(2, 1)] * count
    )


def strangers(count) -> list[Sample]:
    """Samples that share no text with references."""
    return [Sample(Question((number,), ((4,), (5,)))) for number in range(count)]


def drawn(count, seed=0, width=5, shift=3.0):
    """Embeddings with a large common part."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator) + shift


def brute(query, own, metric):
    """(B, N) similarities and distances, in float64 loops."""
    mean = own.double().mean(0) * (metric != "cosine")
    spread = own.double().std(0, correction=0)
    spread = spread if metric in ("standardized cosine", "euclidean") else torch.ones(len(mean))
    near, far = torch.zeros(len(query), len(own)), torch.zeros(len(query), len(own))
    for row, a in enumerate(query.double() - mean):
        for number, b in enumerate(own.double() - mean):
            u, v = a / spread, b / spread
            near[row, number] = float((u @ v) / (u.norm() * v.norm()))
            far[row, number] = float(
                (a - b).norm() if metric == "euclidean" else (u / u.norm() - v / v.norm()).norm()
            )
    return near, far


@pytest.mark.parametrize("metric", METRICS)
@given(count=st.integers(1, 40), k=st.integers(0, 6), seed=st.integers(0, 99))
def test_neighbors_are_those_of_a_loop(metric, count, k, seed):
    """The k nearest, nearest first, with cosines and distances of a float64 loop."""
    own, query = drawn(count, seed), drawn(3, seed + 1000)
    if count == 1 and metric != "cosine":
        return  # nothing is left of the only one
    found = find(query, reference(own), Neighbors(k, metric=metric, max_similarity=None))
    near, far = brute(query, own, metric)
    assert found.indices.shape == found.weights.shape == (3, k)
    for row in range(3):
        expected = sorted(range(count), key=lambda one: float(far[row, one]))[:k]
        got = found.indices[row, : len(expected)].tolist()
        torch.testing.assert_close(far[row, got], far[row, expected], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            found.distance[row, : len(got)], far[row, got], rtol=1e-5, atol=1e-5
        )
        torch.testing.assert_close(
            found.similarity[row, : len(got)], near[row, got], rtol=1e-5, atol=1e-5
        )
        assert found.indices[row, len(expected) :].tolist() == [-1] * max(0, k - count)
        assert found.weights[row].sum() == pytest.approx(1.0 if k else 0.0)


@given(seed=st.integers(0, 99))
def test_permuting_references_changes_only_their_numbers(seed):
    """Neighbors, distances and weights are the same under any order of the references."""
    own, query = drawn(60, seed), drawn(4, seed + 500)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(seed))
    plain = find(query, reference(own))
    moved = find(query, reference(own[order]))
    assert torch.equal(order[moved.indices], plain.indices)
    torch.testing.assert_close(moved.weights, plain.weights)
    torch.testing.assert_close(moved.distance, plain.distance)


def test_a_huge_dimension_does_not_decide():
    """One that holds nearly all variance hides the rest from a centered cosine, not by default."""
    own, query = drawn(300, 1, 16), drawn(8, 2, 16)
    huge = [torch.cat([one, 1000 * drawn(len(one), 5, 1)], dim=1) for one in (own, query)]
    expected = find(query, reference(own), Neighbors(20))
    found = find(huge[1], reference(huge[0]), Neighbors(20))
    centered = find(huge[1], reference(huge[0]), Neighbors(20, metric="centered cosine"))

    def shared(other):
        return (expected.indices[:, :, None] == other.indices[:, None]).any(2).float().mean()

    assert shared(found) > 0.6 > 0.3 > shared(centered)
    assert found.dropped.sum() == 0
    assert centered.dropped.min() > 100


def test_dimensions_that_do_not_vary_say_nothing():
    """A constant of the references is no division by zero, whatever the sample has there."""
    own, query = drawn(50, 1), drawn(3, 2)
    flat = torch.cat([own, torch.ones(50, 1)], dim=1)
    for last in (1.0, 5.0):
        mine = torch.cat([query, torch.full((3, 1), last)], dim=1)
        found = find(mine, reference(flat))
        assert torch.equal(found.indices, find(query, reference(own)).indices)


def test_a_copy_is_found_where_all_references_are_the_same():
    """A single reference has no spread: its copy is a near-duplicate, anything else is none."""
    own = drawn(1, 1).expand(3, 5)
    query = torch.cat([own[:1] * (1 + 1e-7), drawn(1, 2)])
    found = find(query, reference(own))
    assert found.present.sum(1).tolist() == [0, 3]
    assert found.dropped.tolist() == [3, 0]
    assert Index(own).similarities(query).tolist() == [[1, 1, 1], [0, 0, 0]]


def test_all_similarities_are_those_of_the_search():
    """The table over all references agrees with what neighbors are told."""
    own, query = drawn(40, 1), drawn(3, 2)
    found = find(query, reference(own), Neighbors(40, max_similarity=None))
    table = Index(own).similarities(query)
    torch.testing.assert_close(table.gather(1, found.indices), found.similarity)


def test_equally_near_references_come_by_number():
    """Ties are broken by the numbers of references, also where they fill many searches."""
    own = torch.cat([drawn(2000, 1), drawn(1, 2).expand(300, 5)])
    found = find(drawn(1, 2) + 1e-3, reference(own), Neighbors(4, max_similarity=None))
    assert found.indices.tolist() == [[2000, 2001, 2002, 2003]]


def test_a_sample_finds_the_same_alone_and_in_a_batch():
    """Bit for bit, at several sizes of batch; also random neighbors, also in another order."""
    own, query = drawn(5000, 1, 64), drawn(33, 2, 64)
    for settings in (Neighbors(), Neighbors().random(3), Neighbors(radius=1.2, most=5)):
        finder = Finder(reference(own), settings)
        together = finder.find(query, strangers(33))
        for row in (0, 7, 32):
            alone = finder.find(query[[row]], [strangers(33)[row]])
            assert torch.equal(alone.indices[0], together.indices[row, : alone.indices.shape[1]])
            assert torch.equal(alone.weights[0], together.weights[row, : alone.weights.shape[1]])


def test_near_duplicates_are_left_out_and_counted():
    """References more similar than the limit make room for the next ones."""
    own = drawn(50, 1)
    query = own[[3, 9]] + 1e-4
    kept = find(query, reference(own), Neighbors(2, max_similarity=0.95))
    every = find(query, reference(own), Neighbors(2, max_similarity=None))
    assert every.indices[:, 0].tolist() == [3, 9]
    assert float(kept.similarity.max()) <= 0.95
    assert (kept.dropped >= 1).all()
    assert every.dropped.tolist() == [0, 0]


def test_near_duplicates_by_text_are_left_out():
    """A reference with the test's own prompt is no neighbor, however far its embedding is."""
    own = reference(drawn(20, 1))
    query = drawn(1, 2)
    nearest = int(find(query, own, Neighbors(1, max_similarity=None)).indices)
    test = Sample(Question(own.samples[nearest].question.prompt, ((4,),)))
    found = find(query, own, Neighbors(3, max_similarity=None), [test])
    assert nearest not in found.indices
    assert found.dropped.tolist() == [1]
    same = find(query, own, Neighbors(3, max_similarity=None, ngram=None), [test])
    assert nearest in same.indices


def test_a_ball_holds_all_within_its_radius():
    """As a loop finds them, at most `most`; an empty ball is nobody."""
    own, query = drawn(200, 1), drawn(4, 2)
    settings = Neighbors(radius=0.9, most=500, max_similarity=None)
    found = find(query, reference(own), settings)
    _, far = brute(query, own, "standardized cosine")
    for row in range(4):
        inside = {number for number in range(200) if float(far[row, number]) <= 0.9}
        assert set(found.indices[row][found.present[row]].tolist()) == inside
    assert find(query, reference(own), replace(settings, most=2)).indices.shape == (4, 2)
    empty = find(query, reference(own), replace(settings, radius=0.0))
    assert empty.indices.shape == (4, 0)


def test_what_repeats_a_sample_is_what_is_left_out():
    """`repeats` marks exactly the references that a search for all of them leaves out."""
    own, query = drawn(60, 1, width=2), drawn(5, 2, width=2)
    known, tests = reference(own), strangers(5)
    known.samples[7] = tests[2]
    for settings in (Neighbors(60), Neighbors(60, ngram=None), Neighbors(60, max_similarity=None)):
        finder = Finder(known, settings)
        repeats, found = finder.repeats(query, tests), finder.find(query, tests)
        assert repeats.any() or settings.ngram is None
        for row in range(5):
            kept = set(found.indices[row][found.present[row]].tolist())
            assert kept == set((~repeats[row]).nonzero().flatten().tolist())


def test_nobody_is_left():
    """No references, all filtered out, none asked for, an embedding that is NaN: weights are 0."""
    own, query = drawn(4, 1), drawn(2, 2)
    for settings, references in (
        (Neighbors(), reference(own).subset([])),
        (Neighbors(max_similarity=-1.0), reference(own)),
        (Neighbors(0), reference(own)),
    ):
        found = find(query, references, settings)
        assert not found.present.any()
        assert float(found.weights.sum()) == 0
    query[0] = torch.nan
    found = find(query, reference(own))
    assert found.weights.sum(1).tolist() == [0, pytest.approx(1)]


def test_random_neighbors_are_anywhere_and_repeatable():
    """The same for the same seed and prompt; others for another seed; on average not near."""
    own, query = drawn(500, 1), drawn(40, 2)
    first = find(query, reference(own), Neighbors().random(1), strangers(40))
    again = find(query, reference(own), Neighbors().random(1), strangers(40))
    other = find(query, reference(own), Neighbors().random(2), strangers(40))
    assert torch.equal(first.indices, again.indices)
    assert not torch.equal(first.indices, other.indices)
    assert abs(float(first.similarity.mean())) < 0.15
    assert len(set(first.indices.flatten().tolist())) > 80
    with pytest.raises(ConfigError, match="pass the samples"):
        find(query, reference(own), Neighbors().random(1))


def test_impossible_settings_are_refused():
    """Typed errors that name the setting."""
    for settings, words in (
        ({"k": -1}, "k=-1"), ({"radius": -0.1}, "radius"), ({"metric": "taxi"}, "metric='taxi'"),
        ({"kernel": "cauchy"}, "unknown kernel"), ({"max_overlap": 0.0}, "max_overlap"),
        ({"backend": "annoy"}, "backend"), ({"order": "random", "radius": 1.0}, "use k"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            Neighbors(**settings)
    with pytest.raises(ConfigError, match="width 5"):
        find(drawn(2, 1, 7), reference(drawn(4)))
    with pytest.raises(ConfigError, match="2 embeddings for 3 samples"):
        find(drawn(2), reference(drawn(4)), Neighbors(), strangers(3))
    assert Neighbors(kernel=Linear()).kernel == Linear()


def test_rows_of_a_neighborhood_are_its_samples():
    """Picking rows picks every field."""
    found = find(drawn(4, 2), reference(drawn(30)))
    picked = found.rows([2, 0])
    assert len(picked) == 2
    assert torch.equal(picked.indices, found.indices[[2, 0]])
    assert torch.equal(picked.query, found.query[[2, 0]])


def test_faiss_finds_what_the_product_finds():
    """With faiss installed its graph finds (nearly) the same; without, the error says how."""
    own, query = drawn(3000, 1, 16), drawn(20, 2, 16)
    settings = Neighbors(backend="faiss", max_similarity=None)
    if importlib.util.find_spec("faiss") is None:
        with pytest.raises(MissingDependencyError, match=r"expertmix\[knn\]"):
            find(query, reference(own), settings)
        return
    for metric in METRICS:
        exact = find(query, reference(own), Neighbors(metric=metric, max_similarity=None))
        found = find(query, reference(own), replace(settings, metric=metric))
        assert float((found.indices == exact.indices).float().mean()) > 0.9
    assert torch.equal(normalize(found.query, dim=1), normalize(query, dim=1))
