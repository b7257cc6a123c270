"""The ladder by which rows of different machines are compared, with answers known beforehand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.bundle import Precision
from fallow.comparison import (
    CEILING_PPM,
    PPM,
    PPM_MAX,
    PROFILE_SAMPLES_MIN,
    CandidateFinding,
    ColumnSpread,
    Finding,
    Spread,
    ToleranceProfile,
)
from fallow.ids import Digest
from fallow.row_block import RowBlock
from fallow.row_comparison import (
    ALLOWED_FACTOR,
    GUILT_FACTOR,
    PROFILE_FLOOR_PPM,
    Comparison,
    LabelScores,
    Reference,
    deviation_of,
    measured_spread,
    unmeasured,
)
from fallow.row_values import ColumnValues
from fallow.rows import RowCodec
from fallow.schema import DType, RaggedColumn, Schema, StringColumn, TensorColumn

DIGEST = Digest(b"o" * 32)
NONCE = bytes(16)
OWN, OTHER = "class-a", "class-b"
UNIT = 2.0**-20
SPREAD = Spread((ColumnSpread("y", UNIT, 1.0), ColumnSpread("scores", UNIT, 1.0)), 256, 2.0**-22)
FLOATS = Schema((TensorColumn("y", DType.FLOAT32, (4,)),))
ONES = np.ones(4, np.float32)


def block_of(schema: Schema, rows: Sequence[Mapping[str, Any] | None]) -> RowBlock:
    """A block of these rows; None: a row without a value."""
    valued = [row for row in rows if row is not None]
    columns = {
        column.name: np.array([row[column.name] for row in valued])
        if isinstance(column, TensorColumn)
        else [row[column.name] for row in valued]
        for column in schema.columns
    }
    positions = np.array([place for place, row in enumerate(rows) if row is not None], np.int64)
    data = RowCodec(schema, DIGEST).encode(columns, nonce=NONCE, positions=positions, row_count=len(rows))
    return RowBlock.parse(data)


def profile_of(max_ppm: int, samples: int = PROFILE_SAMPLES_MIN) -> ToleranceProfile:
    return ToleranceProfile(OWN, OTHER, samples, max_ppm // 4, max_ppm // 2, max_ppm)


def beside(
    schema: Schema,
    own: Mapping[str, Any] | None,
    other: Mapping[str, Any] | None,
    *,
    execution_class: str = OTHER,
    profile: ToleranceProfile | None = None,
    forms: Sequence[Mapping[str, Any]] = (),
    labels: tuple[LabelScores, ...] = (),
    spread: Spread = SPREAD,
    steady: bool = True,
) -> CandidateFinding:
    """What is found of one row."""
    whole = {"y": ONES} if schema is FLOATS else None
    mine, theirs = [own], [other]
    if own is None or other is None:
        # A block needs a row with a value to be of a schema that has one.
        mine, theirs = [own, whole], [other, whole]
    in_forms = tuple(block_of(schema, [form]) for form in forms)
    reference = Reference(
        block_of(schema, mine), OWN, spread, in_forms, labels, frozenset([0]) if steady else frozenset()
    )
    comparison = Comparison(schema, DIGEST, reference)
    count = len(theirs)
    profiles = {OTHER: profile} if profile is not None else {}
    return comparison.findings(block_of(schema, theirs), range(count), [execution_class] * count, profiles)[0]


def moved(spreads: float) -> dict[str, Any]:
    """Ones, one of which lies so many spreads away: an element's size and the column's scale are 1 each."""
    row = ONES.astype(np.float64)
    row[2] += spreads * 2 * UNIT
    return {"y": row.astype(np.float32)}


def test_rows_of_one_class_are_the_same_bytes_or_wrong() -> None:
    assert beside(FLOATS, {"y": ONES}, {"y": ONES}, execution_class=OWN) == CandidateFinding(Finding.EQUAL)
    assert beside(FLOATS, {"y": ONES}, moved(1), execution_class=OWN) == CandidateFinding(Finding.WRONG, PPM_MAX)


def test_a_row_that_is_not_steady_proves_nothing_in_its_own_class() -> None:
    for spreads, finding in ((1, Finding.TIE), (50, Finding.UNEXPLAINED)):
        found = beside(FLOATS, {"y": ONES}, moved(spreads), execution_class=OWN, steady=False)
        assert found.finding is finding


def test_rows_without_a_value_are_equal_withheld_or_a_tie() -> None:
    assert beside(FLOATS, None, None).finding is Finding.EQUAL
    for execution_class in (OWN, OTHER):
        assert beside(FLOATS, {"y": ONES}, None, execution_class=execution_class).finding is Finding.WITHHELD
        assert beside(FLOATS, None, {"y": ONES}, execution_class=execution_class).finding is Finding.TIE


@pytest.mark.parametrize("samples", [0, PROFILE_SAMPLES_MIN - 1])
@pytest.mark.parametrize(("spreads", "finding"), [(0.5, Finding.TIE), (3.9, Finding.TIE), (4.5, Finding.UNEXPLAINED)])
def test_without_a_profile_nobody_is_guilty(spreads: float, finding: Finding, samples: int) -> None:
    for profile in (None, profile_of(PPM, samples)):
        found = beside(FLOATS, {"y": ONES}, moved(spreads), profile=profile)
        assert found.finding is finding
        assert found.deviation_ppm == pytest.approx(spreads * PPM, rel=0.1)
        assert found.error_ppm_of_tolerance == found.deviation_ppm * PPM // CEILING_PPM
    far = beside(FLOATS, {"y": ONES}, {"y": -1e30 * ONES})
    assert far.finding is Finding.UNEXPLAINED


@pytest.mark.parametrize(
    ("spreads", "finding"),
    [
        (0.9 * ALLOWED_FACTOR, Finding.WITHIN_TOLERANCE),
        (1.1 * ALLOWED_FACTOR, Finding.UNEXPLAINED),
        (0.9 * GUILT_FACTOR, Finding.UNEXPLAINED),
        (1.1 * GUILT_FACTOR, Finding.WRONG),
        (1e6, Finding.WRONG),
    ],
)
def test_a_profile_allows_proves_and_leaves_a_gap_between(spreads: float, finding: Finding) -> None:
    assert beside(FLOATS, {"y": ONES}, moved(spreads), profile=profile_of(PPM)).finding is finding


def test_no_profile_is_narrower_than_the_floor_or_wider_than_what_rounding_explains() -> None:
    just_within = ALLOWED_FACTOR * PROFILE_FLOOR_PPM / PPM * 0.9
    assert beside(FLOATS, {"y": ONES}, moved(just_within), profile=profile_of(0)).finding is Finding.WITHIN_TOLERANCE
    taught = profile_of(1_000 * PPM)
    beyond = beside(FLOATS, {"y": ONES}, moved(1.1 * CEILING_PPM / PPM), profile=taught)
    assert beyond.finding is Finding.UNEXPLAINED
    assert beside(FLOATS, {"y": ONES}, moved(500), profile=taught).finding is Finding.WRONG


def test_a_row_that_moves_by_itself_has_a_wider_spread() -> None:
    assert beside(FLOATS, {"y": ONES}, moved(20)).finding is Finding.UNEXPLAINED
    assert beside(FLOATS, {"y": ONES}, moved(20), forms=[moved(0.1), moved(-19)]).finding is Finding.TIE


@pytest.mark.parametrize(
    ("own", "other", "finding"),
    [
        ([np.nan, 1, 1, 1], [np.nan, 1, 1, 1 + UNIT], Finding.TIE),
        ([np.inf, 1, 1, 1], [np.inf, 1, 1, 1 + UNIT], Finding.TIE),
        ([np.inf, 1, 1, 1], [-np.inf, 1, 1, 1], Finding.UNEXPLAINED),
        ([np.nan, 1, 1, 1], [0, 1, 1, 1], Finding.UNEXPLAINED),
        ([1, 1, 1, 1], [np.nan, 1, 1, 1], Finding.UNEXPLAINED),
        ([3e38, 1, 1, 1], [np.inf, 1, 1, 1], Finding.UNEXPLAINED),
        ([0, 1, 1, 1], [-0.0, 1, 1, 1], Finding.TIE),
        ([0, 0, 0, 0], [1, 0, 0, 0], Finding.UNEXPLAINED),
    ],
)
def test_what_is_no_number_must_be_the_same_and_is_never_guilt(
    own: list[float], other: list[float], finding: Finding
) -> None:
    mine, theirs = np.array(own, np.float32), np.array(other, np.float32)
    assert beside(FLOATS, {"y": mine}, {"y": theirs}).finding is finding
    judged = beside(FLOATS, {"y": mine}, {"y": theirs}, profile=profile_of(PPM)).finding
    assert judged in {Finding.WITHIN_TOLERANCE, Finding.UNEXPLAINED} or own == [0, 0, 0, 0]


def test_nan_has_one_meaning_whatever_its_bits() -> None:
    odd = np.array([0x7FC00001, 0, 0, 0], np.uint32).view(np.float32)
    plain = np.array([np.nan, 0, 0, 0], np.float32)
    found = beside(FLOATS, {"y": plain}, {"y": odd})
    assert (found.finding, found.deviation_ppm) == (Finding.TIE, 0)


def test_elements_near_zero_are_measured_by_what_was_summed() -> None:
    own = np.array([1e-9, 1, 1, 1], np.float32)
    other = np.array([1e-9 + UNIT / 2, 1, 1, 1], np.float32)
    assert beside(FLOATS, {"y": own}, {"y": other}).deviation_ppm < PPM


INTEGERS = Schema((TensorColumn("n", DType.INT64, (2,)), TensorColumn("y", DType.FLOAT32, (4,))))
TEXTS = Schema((StringColumn("text"),))


def test_integers_and_texts_must_be_the_same_and_are_no_proof_between_classes() -> None:
    for schema, own, other in (
        (INTEGERS, {"n": [1, 2], "y": ONES}, {"n": [1, 3], "y": ONES}),
        (TEXTS, {"text": "one"}, {"text": "two"}),
    ):
        assert beside(schema, own, other, execution_class=OWN).finding is Finding.WRONG
        for profile in (None, profile_of(PPM)):
            found = beside(schema, own, other, profile=profile)
            assert found == CandidateFinding(Finding.UNEXPLAINED, PPM_MAX, PPM_MAX)
        # The referee itself gives the other one in another form: nobody can tell.
        assert beside(schema, own, other, forms=[other]).finding is Finding.TIE


def test_ragged_floats_need_the_same_shape() -> None:
    schema = Schema((RaggedColumn("y", DType.FLOAT32, (None,)),))
    near = {"y": (ONES + np.float32(UNIT)).astype(np.float32)}
    assert beside(schema, {"y": ONES}, near).finding is Finding.TIE
    assert beside(schema, {"y": ONES}, {"y": ONES[:3]}).finding is Finding.UNEXPLAINED


def test_a_row_that_follows_no_schema_is_wrong_in_any_class() -> None:
    from fallow.row_block import pack

    own = block_of(FLOATS, [{"y": ONES}, {"y": ONES}])
    junk = RowBlock.parse(pack(DIGEST, [b"junk", bytes(own[1])], [], NONCE))
    comparison = Comparison(FLOATS, DIGEST, Reference(own, OWN, SPREAD))
    found = comparison.findings(junk, [0, 1], [OTHER, OTHER], {})
    assert [one.finding for one in found] == [Finding.WRONG, Finding.EQUAL]


LABELS = Schema((StringColumn("label"), TensorColumn("label_score", DType.FLOAT32, ())))


def labelled(scores: Sequence[float], label: str, score: float, other: str, **changes: Any) -> CandidateFinding:
    head = LabelScores(("label",), ("ant", "bee", "cat"), "scores", {0: np.array(scores, np.float64)})
    return beside(
        LABELS,
        {"label": label, "label_score": np.float32(score)},
        {"label": other, "label_score": np.float32(score)},
        labels=(head,),
        **changes,
    )


def test_a_label_counts_only_by_the_margin_that_the_referee_sees() -> None:
    near = [1.0, 1.0 - UNIT, 0.2]
    assert labelled(near, "ant", 1.0, "bee").finding is Finding.TIE
    assert labelled(near, "ant", 1.0, "bee", profile=profile_of(PPM)).finding is Finding.WITHIN_TOLERANCE
    assert labelled(near, "ant", 1.0, "cat").finding is Finding.UNEXPLAINED
    assert labelled(near, "ant", 1.0, "cat", profile=profile_of(PPM)).finding is Finding.WRONG
    assert labelled(near, "ant", 1.0, "dog", profile=profile_of(PPM)).finding is Finding.UNEXPLAINED
    assert labelled(near, "ant", 1.0, "cat", execution_class=OWN).finding is Finding.WRONG
    # Half the margin: each side may have moved towards the other.
    assert labelled(near, "ant", 1.0, "bee").deviation_ppm == pytest.approx(PPM // 4, rel=0.01)


def test_no_ranking_names_a_label_twice() -> None:
    schema = Schema((StringColumn("label_0"), StringColumn("label_1")))
    head = LabelScores(("label_0", "label_1"), ("ant", "bee", "cat"), "scores", {0: np.array([1.0, 1.0 - UNIT, 0.2])})
    own = {"label_0": "ant", "label_1": "bee"}
    assert beside(schema, own, {"label_0": "bee", "label_1": "ant"}, labels=(head,)).finding is Finding.TIE
    assert beside(schema, own, {"label_0": "ant", "label_1": "ant"}, labels=(head,)).finding is Finding.UNEXPLAINED


def test_a_spread_is_the_largest_move_of_a_column_and_never_below_the_floor() -> None:
    ones = np.ones((3, 4), np.float32)
    own: Mapping[str, ColumnValues] = {"y": ones, "text": ["a", "b", "c"]}
    other = {**own, "y": ones + np.float32(2 * UNIT) * np.eye(3, 4, dtype=np.float32)}
    spread = measured_spread(own, [own, other], Precision.FP32)
    assert spread.samples == 3
    assert spread.of("y").relative == pytest.approx(UNIT)
    assert spread.of("y").scale == 1.0
    assert measured_spread(own, [own], Precision.FP32).of("y").relative == spread.floor
    assert unmeasured(Precision.FP32).of("y").relative > spread.floor
    assert unmeasured(Precision.FP16).floor > 100 * unmeasured(Precision.FP32).floor


finite = st.floats(-1e6, 1e6, width=32)


@settings(deadline=None)
@given(st.lists(st.tuples(finite, finite), min_size=1, max_size=8), st.floats(1e-6, 1e6))
def test_a_deviation_is_zero_for_the_same_and_grows_with_the_distance(
    pairs: list[tuple[float, float]], scale: float
) -> None:
    own = np.array([one for one, _ in pairs], np.float32)
    other = np.array([two for _, two in pairs], np.float32)
    assert deviation_of(own, own, scale=scale) == 0.0
    near, far = deviation_of(own, other, scale=scale), deviation_of(own, 2 * other - own, scale=scale)
    assert near is not None and far is not None
    assert 0.0 <= near <= far or far == pytest.approx(near)
    wider = deviation_of(own, other, scale=2 * scale)
    assert wider is not None and wider <= near
