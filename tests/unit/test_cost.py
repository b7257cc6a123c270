"""Cost by size: the curve, groups of rows, the fit, and how a job's blocks are counted."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fallow.cost import (
    COST_KNOTS_MAX,
    SIZE_MAX,
    UNIT_NANOS,
    UNIT_NANOS_PER_ROW_MAX,
    CostCurve,
    CostKnot,
    SizeBin,
    bin_of,
    binned,
    fault_of_curve,
)
from fallow_coordinator.core.cutting import Cost, Layout, cut_size, unit_micros, unit_nano_starts
from fallow_worker.engine.cost_fit import FLOPS_FLOOR_SPEEDUP, REFERENCE_FLOPS, Measured, fitted, undisturbed

STEEP = CostCurve(1, (CostKnot(0, 100), CostKnot(10, 200), CostKnot(20, 1_200)))


@st.composite
def curves(draw: st.DrawFn) -> CostCurve:
    count = draw(st.integers(1, COST_KNOTS_MAX))
    sizes = sorted(draw(st.sets(st.integers(0, SIZE_MAX), min_size=count, max_size=count)))
    costs = sorted(draw(st.lists(st.integers(1, UNIT_NANOS_PER_ROW_MAX), min_size=count, max_size=count)))
    number = 1 if count > 1 else draw(st.integers(0, 1))
    return CostCurve(number, tuple(CostKnot(size, cost) for size, cost in zip(sizes, costs, strict=True)))


def test_cost_lies_on_the_lines_between_knots_and_is_constant_beyond_them() -> None:
    assert [STEEP.unit_nanos(size) for size in (0, 5, 10, 15, 20, 21, SIZE_MAX)] == [
        100,
        150,
        200,
        700,
        1_200,
        1_200,
        1_200,
    ]
    assert STEEP.rows_unit_nanos(0, 50) == 0
    assert STEEP.rows_unit_nanos(4, 60) == 2_800
    assert CostCurve(0, (CostKnot(0, 7),)).rows_unit_nanos(3, 0) == 21


def test_groups_of_like_rows_tell_what_the_mean_of_unlike_rows_hides() -> None:
    rows = [(0,)] * 9 + [(20,)]
    assert sum(STEEP.unit_nanos(size) for (size,) in rows) == 2_100
    assert STEEP.rows_unit_nanos(10, 20) == 1_200
    assert STEEP.unit_nanos_of(binned(rows, feature_count=1)) == 2_100


@given(curves(), st.integers(1, 10**7), st.integers(0, SIZE_MAX))
def test_rows_of_equal_size_cost_what_each_costs(curve: CostCurve, rows: int, size: int) -> None:
    exact = curve.rows_unit_nanos(rows, rows * size)
    assert 0 <= exact - rows * curve.unit_nanos(size) < rows
    assert rows <= exact <= rows * UNIT_NANOS_PER_ROW_MAX


@given(curves(), st.integers(1, 10**6), st.lists(st.integers(0, 2 * SIZE_MAX * 10**6), min_size=2, max_size=2))
def test_larger_rows_never_cost_less(curve: CostCurve, rows: int, sums: list[int]) -> None:
    less, more = sorted(sums)
    assert curve.rows_unit_nanos(rows, less) <= curve.rows_unit_nanos(rows, more)


@given(curves())
def test_sound_curves_have_no_fault(curve: CostCurve) -> None:
    assert fault_of_curve(curve, feature_count=1) == ""


@pytest.mark.parametrize(
    ("curve", "said"),
    [
        (CostCurve(1, ()), "0 knots"),
        (CostCurve(1, tuple(CostKnot(size, 1) for size in range(17))), "17 knots"),
        (CostCurve(2, (CostKnot(0, 1),)), "size feature 2 of 1"),
        (CostCurve(0, (CostKnot(0, 1), CostKnot(1, 2))), "follows no size feature"),
        (CostCurve(1, (CostKnot(0, 0),)), "0 to 0 nano-units"),
        (CostCurve(1, (CostKnot(0, UNIT_NANOS_PER_ROW_MAX + 1),)), "allowed are 1 to"),
        (CostCurve(1, (CostKnot(0, 1), CostKnot(SIZE_MAX + 1, 2))), "sizes 0 to 4294967296"),
        (CostCurve(1, (CostKnot(0, 5), CostKnot(0, 6))), "does not rise"),
        (CostCurve(1, (CostKnot(0, 5), CostKnot(3, 9), CostKnot(4, 7), CostKnot(5, 9))), "does not rise"),
    ],
)
def test_a_curve_that_cannot_be_is_told(curve: CostCurve, said: str) -> None:
    assert said in fault_of_curve(curve, feature_count=1)


@given(st.lists(st.tuples(st.integers(0, SIZE_MAX), st.integers(0, SIZE_MAX)), max_size=60))
def test_groups_hold_every_row_and_every_size(rows: list[tuple[int, int]]) -> None:
    bins = binned(rows, feature_count=2)
    assert sum(group.rows for group in bins) == len(rows)
    for feature in range(2):
        assert sum(group.size_sums[feature] for group in bins) == sum(row[feature] for row in rows)
    assert len(bins) <= len(rows)


@given(st.integers(0, SIZE_MAX), st.integers(0, SIZE_MAX))
def test_groups_are_narrow_and_in_order(one: int, other: int) -> None:
    small, large = sorted((one, other))
    assert bin_of(small) <= bin_of(large) <= 239
    if bin_of(small) == bin_of(large):
        assert Fraction(large) <= Fraction(9, 8) * small


def measured(*costs: tuple[int, float]) -> list[Measured]:
    return [Measured(size, (cost, cost * 1.1, cost * 1.2)) for size, cost in costs]


def test_a_fit_follows_what_bends_and_leaves_out_what_is_straight() -> None:
    quadratic = measured(*((size, 1e-3 + 1e-6 * size**2) for size in (0, 64, 128, 256, 512)))
    curve = fitted(quadratic, feature_number=1, flops_per_row=0)
    assert [knot.size for knot in curve.knots] == [0, 64, 128, 256, 512]
    straight = measured(*((size, 1e-3 + 1e-5 * size) for size in (0, 64, 128, 256, 512)))
    curve = fitted(straight, feature_number=1, flops_per_row=0)
    assert [knot.size for knot in curve.knots] == [0, 512]
    assert curve.note == ""


def test_equal_costs_make_a_constant() -> None:
    curve = fitted(measured((0, 1.0), (10, 1.02), (20, 0.99)), feature_number=1, flops_per_row=0)
    assert len(curve.knots) == 1
    assert curve.unit_nanos(0) == curve.unit_nanos(20) == pytest.approx(1.1e9, rel=0.05)


def test_what_falls_with_size_is_counted_as_level_and_told() -> None:
    curve = fitted(measured((0, 1.0), (10, 3.0), (20, 2.0)), feature_number=1, flops_per_row=0)
    assert curve.unit_nanos(20) == curve.unit_nanos(10)
    assert "cheaper" in curve.note


def test_repeats_that_lie_far_apart_are_told() -> None:
    curve = fitted([Measured(0, (1.0, 2.0, 9.0, 17.0))], feature_number=0, flops_per_row=0)
    assert "apart" in curve.note
    assert curve.spread_permille > 250


def test_no_row_is_cheaper_than_its_operations_on_a_fast_core() -> None:
    flops = int(REFERENCE_FLOPS)
    curve = fitted(measured((0, 1e-9)), feature_number=0, flops_per_row=flops)
    assert curve.unit_nanos(0) == UNIT_NANOS // FLOPS_FLOOR_SPEEDUP


def test_the_best_eighth_counts_so_that_load_beside_does_not() -> None:
    quiet = [1.0, 1.01, 0.99, 1.0, 1.02, 1.0, 1.01, 1.0]
    disturbed = [value * slower for value, slower in zip(quiet, (1, 3, 1, 2, 1, 5, 2, 2), strict=True)]
    assert undisturbed(disturbed, best=min) == pytest.approx(undisturbed(quiet, best=min), rel=0.02)
    assert undisturbed([1.0], best=max) == 1.0


@given(
    st.lists(
        st.tuples(
            st.integers(0, SIZE_MAX), st.lists(st.floats(0, 1e12, allow_subnormal=False), min_size=1, max_size=9)
        ),
        min_size=1,
        max_size=40,
        unique_by=lambda entry: entry[0],
    ),
    st.integers(0, 1),
    st.integers(0, 1 << 62),
)
def test_whatever_was_measured_gives_a_sound_curve(
    entries: list[tuple[int, list[float]]], number: int, flops: int
) -> None:
    rising = [Measured(size, tuple(repeats)) for size, repeats in sorted(entries)]
    assert fault_of_curve(fitted(rising, feature_number=number, flops_per_row=flops), feature_count=1) == ""


@given(curves(), st.lists(st.tuples(st.integers(1, 50), st.integers(0, 10_000)), min_size=1, max_size=12), st.data())
def test_blocks_are_counted_by_their_sizes_and_parts_add_up(
    curve: CostCurve, blocks: list[tuple[int, int]], data: st.DataObject
) -> None:
    rows = [count for count, _ in blocks]
    starts = [0]
    for count in rows:
        starts.append(starts[-1] + count)
    costs = unit_nano_starts(curve, rows, (size for _, size in blocks))
    layout = Layout(tuple(starts), tuple(starts))
    cost = Cost(5, 5, costs)
    assert costs[-1] == curve.unit_nanos_of(SizeBin(count, (size,)) for count, size in blocks)
    total = starts[-1]
    whole = unit_micros(layout, cost, 0, total)
    assert whole == max(1, -(-costs[-1] // 1_000))
    cut = data.draw(st.integers(0, total))
    parts = unit_micros(layout, cost, 0, cut) + unit_micros(layout, cost, cut, total) if 0 < cut < total else whole
    assert whole <= parts <= whole + 2
    size = cut_size(layout, cost, start=0, batch_rows=1, leases=1, output_row_bytes=0)
    assert 1 <= size <= total
