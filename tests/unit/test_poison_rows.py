"""Halving finds exactly the rows that a program does not survive, and spends few children on it."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fallow_worker.executor.poison import Bisection, halvings
from fallow_worker.executor.shards import RowRange


def isolate(rows: RowRange, batch_rows: int, poison: frozenset[int]) -> tuple[Bisection, list[int], int]:
    """(bisection, rows that had a value, children spent) of a program that dies of `poison`."""
    bisection = Bisection(rows, batch_rows=batch_rows)
    valued: list[int] = []
    children, alive = 0, False
    while (tried := bisection.next_rows()) is not None:
        if not alive:
            children, alive = children + 1, True
        if poison.isdisjoint(range(tried.start, tried.end)):
            bisection.survived()
            valued += range(tried.start, tried.end)
        else:
            alive = False
            bisection.died()
    return bisection, valued, children


@given(st.data())
def test_poison_rows_and_no_others_fail(data: st.DataObject) -> None:
    batch_rows = data.draw(st.integers(1, 40))
    start = batch_rows * data.draw(st.integers(0, 3))
    count = data.draw(st.integers(1, 120))
    poison = frozenset(data.draw(st.lists(st.integers(start, start + count - 1), max_size=5)))
    bisection, valued, children = isolate(RowRange(start, start + count), batch_rows, poison)
    assert bisection.poison == sorted(poison)
    assert sorted(valued) == sorted(set(range(start, start + count)) - poison)
    assert children <= 1 + max(1, len(poison)) * (halvings(batch_rows) + 1)


@pytest.mark.parametrize("batch_rows", [1, 2, 3, 4, 7, 8, 32, 100])
def test_one_poison_row_costs_no_more_children_than_promised(batch_rows: int) -> None:
    promised = math.ceil(math.log2(batch_rows)) + 2 if batch_rows > 1 else 2
    rows = RowRange(0, 3 * batch_rows)
    spent = [isolate(rows, batch_rows, frozenset({row}))[2] for row in range(len(rows))]
    assert max(spent) <= promised
