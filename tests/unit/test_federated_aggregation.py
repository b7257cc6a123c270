"""Aggregation rules: against slow references, whatever the order, and bounded by what honest clients send."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fallow.errors import FallowError, Reason
from fallow.federated import aggregation
from fallow.federated.aggregation import (
    CentredClipping,
    ClippedMean,
    Cohort,
    FLTrust,
    GeometricMedian,
    Mean,
    Median,
    MultiKrum,
    Rule,
    TrimmedMean,
    products,
    squared_distances,
)

Matrix = NDArray[np.float32]


@st.composite
def matrices(draw: st.DrawFn, least: int = 5) -> Matrix:
    clients = draw(st.integers(least, 9))
    parameters = draw(st.integers(1, 12))
    seed = draw(st.integers(0, 2**32 - 1))
    chance = np.random.default_rng(seed)
    scale = draw(st.sampled_from([1e-3, 1.0, 1e3]))
    return (chance.normal(size=(clients, parameters)) * scale).astype(np.float32)


def cohort(matrix: Matrix, weights: Sequence[float] | None = None, root: Matrix | None = None) -> Cohort:
    return Cohort(list(matrix), weights or [1.0] * len(matrix), root=root)


def slow_mean(matrix: Matrix) -> NDArray[np.float64]:
    mean: NDArray[np.float64] = matrix.astype(np.float64).sum(axis=0) / len(matrix)
    return mean


def slow_median(matrix: Matrix) -> NDArray[np.float64]:
    return np.array([sorted(column)[len(column) // 2] if len(column) % 2 else
                     (float(sorted(column)[len(column) // 2 - 1]) + float(sorted(column)[len(column) // 2])) / 2
                     for column in matrix.T])  # fmt: skip


def slow_trimmed(matrix: Matrix) -> NDArray[np.float64]:
    return np.array([np.mean([float(value) for value in sorted(column)[1:-1]]) for column in matrix.T])


def slow_krum(matrix: Matrix, byzantine: int, keep: int) -> NDArray[np.float64]:
    wide = matrix.astype(np.float64)
    clients = len(wide)
    scores: list[tuple[float, int]] = []
    for one in range(clients):
        far = sorted(float(((wide[one] - wide[other]) ** 2).sum()) for other in range(clients) if other != one)
        scores.append((sum(far[: clients - byzantine - 2]), one))
    chosen = [number for _, number in sorted(scores)[:keep]]
    mean: NDArray[np.float64] = wide[chosen].mean(axis=0)
    return mean


def slow_centred(matrix: Matrix, radius: float, steps: int) -> NDArray[np.float64]:
    centre = np.zeros(matrix.shape[1])
    for _ in range(steps):
        pulls = [row - centre for row in matrix.astype(np.float64)]
        centre = centre + np.mean(
            [pull * min(1.0, radius / max(1e-300, float(np.linalg.norm(pull)))) for pull in pulls], axis=0
        )
    return centre


def slow_geometric(matrix: Matrix, steps: int) -> NDArray[np.float64]:
    wide = matrix.astype(np.float64)
    point = wide.mean(axis=0)
    for _ in range(steps):
        pulls = np.array([1 / max(1e-6, float(np.linalg.norm(row - point))) for row in wide])
        point = (wide * pulls[:, None]).sum(axis=0) / pulls.sum()
    return np.asarray(point)


def slow_trust(matrix: Matrix, root: Matrix) -> NDArray[np.float64]:
    own = root.astype(np.float64)
    total, trusts = np.zeros(matrix.shape[1]), 0.0
    for row in matrix.astype(np.float64):
        trust = max(0.0, float(row @ own) / float(np.linalg.norm(row) * np.linalg.norm(own)))
        total += trust * row * np.linalg.norm(own) / np.linalg.norm(row)
        trusts += trust
    return total / trusts if trusts else total


REFERENCES: dict[str, tuple[Rule, Callable[[Matrix], NDArray[np.float64]]]] = {
    "fedavg": (Mean(), slow_mean),
    "median": (Median(), slow_median),
    "trimmed-mean": (TrimmedMean(1), slow_trimmed),
    "krum": (MultiKrum(1, keep=1), lambda matrix: slow_krum(matrix, 1, 1)),
    "multi-krum": (MultiKrum(1), lambda matrix: slow_krum(matrix, 1, len(matrix) - 1)),
    "geometric-median": (GeometricMedian(steps=4), lambda matrix: slow_geometric(matrix, 4)),
    "centred-clipping": (CentredClipping(1.5, steps=3), lambda matrix: slow_centred(matrix, 1.5, 3)),
}


@pytest.mark.parametrize("name", REFERENCES)
@given(matrix=matrices())
@settings(max_examples=40)
def test_each_rule_equals_its_slow_reference(name: str, matrix: Matrix) -> None:
    rule, reference = REFERENCES[name]
    found, wanted = rule.aggregate(cohort(matrix)), reference(matrix)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=2e-5 * float(np.abs(matrix).max()))


@given(matrix=matrices())
@settings(max_examples=40)
def test_fltrust_equals_its_slow_reference(matrix: Matrix) -> None:
    found = FLTrust().aggregate(cohort(matrix[1:], root=matrix[0]))
    np.testing.assert_allclose(
        found, slow_trust(matrix[1:], matrix[0]), rtol=2e-4, atol=2e-5 * float(np.abs(matrix).max())
    )


@pytest.mark.parametrize("name", [name for name in REFERENCES if name not in {"krum", "multi-krum"}])
@given(matrix=matrices(), seed=st.integers(0, 1000))
@settings(max_examples=20)
def test_what_clients_are_called_does_not_matter(name: str, matrix: Matrix, seed: int) -> None:
    rule = REFERENCES[name][0]
    order = np.random.default_rng(seed).permutation(len(matrix))
    np.testing.assert_allclose(
        rule.aggregate(cohort(matrix)),
        rule.aggregate(cohort(matrix[order])),
        rtol=1e-4,
        atol=1e-5 * float(np.abs(matrix).max()),
    )


@pytest.mark.parametrize("rule", [Mean(), ClippedMean(1.0), GeometricMedian()])
@given(matrix=matrices(), scale=st.sampled_from([0.5, 2.0, 1024.0]))
@settings(max_examples=20)
def test_only_proportions_of_weights_count(rule: Rule, matrix: Matrix, scale: float) -> None:
    weights = [float(number + 1) for number in range(len(matrix))]
    scaled = rule.aggregate(cohort(matrix, [weight * scale for weight in weights]))
    np.testing.assert_allclose(rule.aggregate(cohort(matrix, weights)), scaled, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "rule", [Median(), TrimmedMean(2), MultiKrum(2), GeometricMedian(steps=32), CentredClipping(1.0)]
)
@given(seed=st.integers(0, 10_000), liar=st.sampled_from([1e6, -1e6, 3e4]))
@settings(max_examples=20)
def test_liars_cannot_move_a_robust_rule_far_and_move_the_mean_anywhere(rule: Rule, seed: int, liar: float) -> None:
    chance = np.random.default_rng(seed)
    honest = chance.normal(size=(9, 6)).astype(np.float32)
    matrix = np.concatenate([honest, np.full((2, 6), liar, np.float32)])
    assert np.abs(rule.aggregate(cohort(matrix))).max() <= 4 * np.abs(honest).max()
    assert np.abs(Mean().aggregate(cohort(matrix))).max() > 1_000


def test_fltrust_counts_nobody_who_disagrees() -> None:
    root = np.array([1.0, 0.0], np.float32)
    liars = np.array([[-5.0, 0.0], [-1.0, 0.1]], np.float32)
    assert not FLTrust().aggregate(cohort(liars, root=root)).any()
    kept = FLTrust().aggregate(cohort(np.array([[100.0, 0.0], [-1.0, 0.0]], np.float32), root=root))
    np.testing.assert_allclose(kept, root)
    assert not FLTrust().aggregate(cohort(np.zeros((2, 2), np.float32), root=root)).any()


def test_blocks_are_told_from_the_whole_by_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = np.random.default_rng(7).normal(size=(6, 1000)).astype(np.float32)
    rules: list[Rule] = [Mean(), Median(), TrimmedMean(1), MultiKrum(1), GeometricMedian()]
    whole = [rule.aggregate(cohort(matrix)) for rule in rules]
    monkeypatch.setattr(aggregation, "BLOCK_BYTES", 8 * 6 * 7)
    for rule, wanted in zip(rules, whole, strict=True):
        np.testing.assert_allclose(rule.aggregate(cohort(matrix)), wanted, rtol=1e-6, atol=1e-7)


@given(matrix=matrices())
def test_distances_from_products_are_distances(matrix: Matrix) -> None:
    wide = matrix.astype(np.float64)
    wanted = ((wide[:, None] - wide[None]) ** 2).sum(axis=2)
    np.testing.assert_allclose(squared_distances(products(list(matrix))), wanted, rtol=1e-7, atol=1e-8 * wanted.max())


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (MultiKrum(2), "multi-krum against 2 liars needs 7 clients; there are 4"),
        (TrimmedMean(2), "trimmed-mean against 2 liars needs 5 clients; there are 4"),
        (MultiKrum(0, keep=9), "keep is 9"),
        (FLTrust(), "rows that you trust"),
        (ClippedMean(0.0), "norm_max is 0.0"),
        (CentredClipping(float("nan")), "radius is nan"),
    ],
)
def test_what_a_rule_needs_is_said(rule: Rule, words: str) -> None:
    with pytest.raises(FallowError, match=words) as caught:
        rule.aggregate(cohort(np.ones((4, 3), np.float32)))
    assert caught.value.reason is Reason.FIELD_INVALID


@pytest.mark.parametrize(
    ("updates", "weights"),
    [([], []), ([np.ones(2)], [1.0]), ([np.ones(2, np.float32)] * 2, [1.0]), ([np.ones(2, np.float32)], [-1.0]),
     ([np.ones(2, np.float32)], [0.0]), ([np.ones(2, np.float32), np.ones(3, np.float32)], [1.0, 1.0]),
     ([np.ones(2, np.float32)], [float("inf")])],
)  # fmt: skip
def test_cohorts_that_cannot_be_are_refused(updates: list[NDArray[np.float32]], weights: list[float]) -> None:
    with pytest.raises(FallowError):
        Cohort(updates, weights)
