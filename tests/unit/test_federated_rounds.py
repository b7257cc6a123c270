"""Rounds, partitions, the server's step and the hygiene of updates, without JAX."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fallow.errors import FallowError
from fallow.federated.aggregation import Median
from fallow.federated.outer import Moments, OuterOptimizer, Plain, diloco, fedadagrad, fedadam, fedyogi
from fallow.federated.partition import Columns, by, dirichlet, iid
from fallow.federated.rounds import ClientUpdate, Study, beginning, finished, participants
from fallow.federated.updates import Layout, update_fault

SEED = b"seed"


def columns(rows: int, classes: int = 3) -> Columns:
    return {"x": np.arange(rows, dtype=np.float32), "y": (np.arange(rows) % classes).astype(np.int32)}


def vector(*numbers: float) -> NDArray[np.float32]:
    return np.array(numbers, np.float32)


# ------------------------------------------------------------------------------------------------- dealing rows


@given(
    rows=st.integers(1, 60),
    clients=st.integers(1, 12),
    seed=st.binary(max_size=8),
    alpha=st.sampled_from([0.05, 0.3, 5.0]),
)
@settings(max_examples=60)
def test_every_row_is_dealt_once_and_nobody_goes_without(rows: int, clients: int, seed: bytes, alpha: float) -> None:
    data = columns(rows)
    if clients > rows:
        with pytest.raises(FallowError, match="clients is"):
            iid(data, clients, seed)
        return
    for deal in (iid, dirichlet(alpha)):
        shards = deal(data, clients, seed)
        assert len(shards) == clients and all(len(shard) for shard in shards)
        assert sorted(int(place) for shard in shards for place in shard) == list(range(rows))
        assert all(np.array_equal(one, other) for one, other in zip(shards, deal(data, clients, seed), strict=True))


def test_a_small_alpha_is_more_skewed() -> None:
    data = columns(3_000)

    def largest_share(alpha: float) -> float:
        shards = dirichlet(alpha)(data, 10, SEED)
        counts = [np.bincount(data["y"][shard].astype(np.int64), minlength=3) for shard in shards]
        return float(np.mean([count.max() / count.sum() for count in counts]))

    assert largest_share(0.05) > largest_share(1.0) > largest_share(100.0) >= 1 / 3
    assert largest_share(100.0) < 0.5


def test_chance_is_the_same_everywhere() -> None:
    """Golden: a simulation must deal like the deployment it stands for, whatever the machine."""
    assert [shard.tolist() for shard in iid(columns(10), 3, SEED)] == [[2, 6, 7, 9], [3, 5, 8], [0, 1, 4]]
    assert participants(Study(SEED, clients_per_round=3), 10, 1) == (2, 6, 8)


def test_one_client_for_each_value_of_a_column() -> None:
    assert [shard.tolist() for shard in by("y")(columns(5), 0, SEED)] == [[0, 3], [1, 4], [2]]
    with pytest.raises(FallowError, match="has 3 values, and 7 clients"):
        by("y")(columns(5), 7, SEED)
    with pytest.raises(FallowError, match="no column 'who'"):
        by("who")(columns(5), 0, SEED)
    with pytest.raises(FallowError, match="differ in rows: x has 2, y has 3"):
        iid({"x": np.zeros(2), "y": np.zeros(3)}, 1, SEED)


# ------------------------------------------------------------------------------------------------- the server's step


def steps_of(outer: OuterOptimizer, changes: list[float]) -> list[float]:
    weights, moments = vector(0.0), outer.start(1)
    found: list[float] = []
    for change in changes:
        weights, moments = outer.step(weights, vector(change), moments)
        found.append(float(weights[0]))
    return found


def test_outer_steps_are_the_papers() -> None:
    assert steps_of(Plain(), [1, 2]) == [1, 3]
    # m = 1, then 0.9 + 1 = 1.9; Nesterov adds 0.9 m + Δ: 1.9 and 2.71, at 0.7.
    assert steps_of(diloco(), [1, 1]) == pytest.approx([0.7 * 1.9, 0.7 * (1.9 + 2.71)])
    # m = 0.1, v = 0.99e-6 + 0.01.
    assert steps_of(fedadam(), [1]) == pytest.approx([0.01 * 0.1 / ((0.99e-6 + 0.01) ** 0.5 + 1e-3)])
    # v − (1 − β₂)Δ²·sign(v − Δ²) = 1e-6 + 0.01.
    assert steps_of(fedyogi(), [1]) == pytest.approx([0.01 * 0.1 / ((1e-6 + 0.01) ** 0.5 + 1e-3)])
    # β₁ = 0, v = 1e-6 + 1.
    assert steps_of(fedadagrad(), [1]) == pytest.approx([0.01 / ((1e-6 + 1) ** 0.5 + 1e-3)], rel=1e-5)


# ------------------------------------------------------------------------------------------------- a round


def test_a_round_does_not_depend_on_the_order_of_arrival() -> None:
    study = Study(SEED)
    start = beginning(vector(0, 0, 0), study)
    updates = [ClientUpdate(n, np.random.default_rng(n).normal(size=3).astype(np.float32), n + 1) for n in range(7)]
    one = finished(study, start, updates)
    other = finished(study, start, list(reversed(updates)))
    assert one.aggregate.tobytes() == other.aggregate.tobytes()
    assert one.progress.weights.tobytes() == other.progress.weights.tobytes()
    assert one.accepted == tuple(range(7)) and one.progress.number == 1


def test_unsound_updates_are_named_and_do_not_count() -> None:
    study = Study(SEED, norm_max=10.0)
    bad = {1: vector(np.nan, 0), 2: vector(100, 0), 3: np.zeros(2), 4: vector(1, 2, 3), 5: vector(0, np.inf)}
    updates = [ClientUpdate(0, vector(1, 1), 5), *(ClientUpdate(n, change, 5) for n, change in bad.items())]  # type: ignore[arg-type]
    updates.append(ClientUpdate(6, vector(1, 1), 0))
    outcome = finished(study, beginning(vector(0, 0), study), updates)
    assert outcome.accepted == (0,) and outcome.aggregate.tolist() == [1, 1]
    assert outcome.refused == {
        1: "number 0 is nan",
        2: "its norm is 100, allowed is 10",
        3: "it is float64[2], wanted is float32[2]",
        4: "it is float32[3], wanted is float32[2]",
        5: "number 1 is inf",
        6: "it says that it has 0 rows",
    }


def test_too_few_sound_updates_leave_the_weights() -> None:
    study = Study(SEED, clients_min=2)
    start = beginning(vector(3, 4), study)
    outcome = finished(study, start, [ClientUpdate(0, vector(1, 1), 1)])
    assert outcome.stalled == "1 sound updates, wanted are 2"
    assert outcome.progress.weights.tolist() == [3, 4] and outcome.progress.number == 1


def test_what_a_client_says_of_its_rows_counts_up_to_a_bound() -> None:
    study = Study(SEED, rows_weight_max=10)
    updates = [ClientUpdate(0, vector(0), 10), ClientUpdate(1, vector(1), 10**9)]
    assert finished(study, beginning(vector(0), study), updates).aggregate.tolist() == [0.5]
    with pytest.raises(FallowError, match="two updates"):
        finished(study, beginning(vector(0), study), [updates[0], updates[0]])


def test_rules_meet_in_a_study() -> None:
    study = Study(SEED, rule=Median(), clients_per_round=3)
    updates = [ClientUpdate(n, vector(value), 1) for n, value in enumerate([1, 2, 900])]
    assert finished(study, beginning(vector(0), study), updates).progress.weights.tolist() == [2]
    with pytest.raises(FallowError, match="clients_min is 0"):
        Study(SEED, clients_min=0)
    with pytest.raises(FallowError, match="clients_per_round is 2"):
        Study(SEED, clients_per_round=2, clients_min=3)
    with pytest.raises(FallowError, match="rows_weight_max is 0"):
        Study(SEED, rows_weight_max=0)


# ------------------------------------------------------------------------------------------------- layouts


def test_weights_travel_in_the_order_of_their_names() -> None:
    weights = {"b": vector(5, 6), "a": np.array([[1, 2], [3, 4]], np.float32)}
    layout = Layout.of(weights)
    flat = layout.flat(weights)
    assert flat.tolist() == [1, 2, 3, 4, 5, 6] and layout.parameters == 6
    back = layout.arrays(flat)
    assert {name: array.tolist() for name, array in back.items()} == {"a": [[1, 2], [3, 4]], "b": [5, 6]}


@pytest.mark.parametrize(
    ("given_weights", "words"),
    [
        ({"a": np.zeros((2, 2), np.float32)}, "weight 'b' is missing"),
        ({"a": np.zeros((2, 3), np.float32), "b": vector(1, 2)}, r"weight 'a' is float32\[2, 3\]"),
        ({"a": np.zeros((2, 2), np.float32), "b": vector(1, 2), "c": vector(1)}, "'c' is none of the weights"),
    ],
)
def test_other_weights_are_named(given_weights: dict[str, NDArray[np.float32]], words: str) -> None:
    layout = Layout.of({"b": vector(5, 6), "a": np.zeros((2, 2), np.float32)})
    with pytest.raises(FallowError, match=words):
        layout.flat(given_weights)


def test_layouts_want_float32_and_vectors_of_their_length() -> None:
    with pytest.raises(FallowError, match="weight 'a' is float64"):
        Layout.of({"a": np.zeros(2)})
    with pytest.raises(FallowError, match="3 numbers are no weights"):
        Layout.of({"a": vector(1)}).arrays(vector(1, 2, 3))
    assert update_fault(vector(3, 4), parameters=2, norm_max=5.0) == ""
    assert Moments(vector(), vector()) is not None
