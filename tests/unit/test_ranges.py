"""Range sets behave as the sets of integers that they stand for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fallow.errors import FallowError, Reason
from fallow.ranges import RangeSet

END = 40
bounds = st.integers(0, END)
spans = st.tuples(bounds, bounds)
sets = st.frozensets(st.integers(0, END - 1))


def model(ranges: RangeSet) -> set[int]:
    return set(ranges)


def is_normal(ranges: RangeSet) -> bool:
    return RangeSet.from_flat(ranges.flat) == ranges and len(ranges) == len(model(ranges))


@given(st.lists(spans))
def test_construction_gives_the_union(given_spans: list[tuple[int, int]]) -> None:
    ranges = RangeSet(given_spans)
    assert model(ranges) == {position for start, end in given_spans for position in range(start, end)}
    assert is_normal(ranges)


@given(sets, spans)
def test_add_and_subtract_follow_the_model(positions: frozenset[int], span: tuple[int, int]) -> None:
    ranges = RangeSet.of_positions(positions)
    added, subtracted = ranges.add(*span), ranges.subtract(*span)
    assert model(added) == positions | set(range(*span))
    assert model(subtracted) == positions - set(range(*span))
    assert is_normal(added)
    assert is_normal(subtracted)


@given(sets, sets)
def test_set_operations_follow_the_model(left: frozenset[int], right: frozenset[int]) -> None:
    a, b = RangeSet.of_positions(left), RangeSet.of_positions(right)
    for made, wanted in ((a | b, left | right), (a - b, left - right), (a & b, left & right)):
        assert model(made) == wanted
        assert is_normal(made)
    assert a.isdisjoint(b) == left.isdisjoint(right)
    assert (a == b) == (left == right)
    assert (a != b) or hash(a) == hash(b)


@given(sets, spans)
def test_questions_follow_the_model(positions: frozenset[int], span: tuple[int, int]) -> None:
    ranges = RangeSet.of_positions(positions)
    asked = set(range(*span))
    assert ranges.overlaps(*span) == bool(asked & positions)
    assert ranges.covers(*span) == (asked <= positions)
    assert {position for position in range(END + 1) if position in ranges} == positions
    assert list(ranges) == sorted(positions)
    assert bool(ranges) == bool(positions)


@given(sets, st.integers(0, END + 5))
def test_take_first_splits_at_the_count(positions: frozenset[int], count: int) -> None:
    ranges = RangeSet.of_positions(positions)
    taken, rest = ranges.take_first(count)
    assert sorted(taken) == sorted(positions)[:count]
    assert sorted(rest) == sorted(positions)[count:]
    assert is_normal(taken)
    assert is_normal(rest)


@given(sets, bounds)
def test_complement_follows_the_model(positions: frozenset[int], end: int) -> None:
    complement = RangeSet.of_positions(positions).complement(end)
    assert model(complement) == set(range(end)) - positions
    assert is_normal(complement)


@pytest.mark.parametrize("flat", [(1,), (2, 1), (1, 1), (0, 2, 2, 3), (-1, 3), (0, 5, 3, 8)])
def test_a_flat_form_that_is_not_normal_is_refused(flat: tuple[int, ...]) -> None:
    with pytest.raises(FallowError) as refused:
        RangeSet.from_flat(flat)
    assert refused.value.reason is Reason.FIELD_INVALID


def test_repr_shows_the_ranges() -> None:
    assert repr(RangeSet([(0, 2), (5, 6)])) == "RangeSet(0..2, 5..6)"
    assert RangeSet([(0, 2), (5, 6)]).range_count == 2
