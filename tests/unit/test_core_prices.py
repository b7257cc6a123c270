"""Prices, reservations and pay, as properties."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fallow.credits import ASK_MICROCREDITS_PER_UNIT_MAX
from fallow_coordinator.core.limits import TASK_UNIT_MICROS_MAX
from fallow_coordinator.core.prices import is_within, pay, price_paid, reservation

ASKS = st.integers(0, ASK_MICROCREDITS_PER_UNIT_MAX)


@given(st.lists(ASKS, min_size=2, max_size=2).map(sorted), st.none() | ASKS, st.booleans())
def test_a_winner_gets_its_ask_at_least_and_the_limit_at_most(
    rising: list[int], runner_up_ask: int | None, limited: bool
) -> None:
    ask, limit = rising[0], rising[1] if limited else None
    assert is_within(ask, limit)
    price = price_paid(ask=ask, runner_up_ask=runner_up_ask, limit=limit)
    assert price >= ask
    assert limit is None or price <= limit
    assert price in {ask, runner_up_ask, limit}


@given(st.lists(ASKS, min_size=4, max_size=4).map(sorted), st.booleans())
def test_a_winner_gains_nothing_by_asking_more_as_long_as_it_wins(rising: list[int], limited: bool) -> None:
    ask, higher, low, high = rising
    for runner_up_ask, limit in ((low, high), (high, low)):
        bound = limit if limited else None
        first = price_paid(ask=ask, runner_up_ask=runner_up_ask, limit=bound)
        assert first == price_paid(ask=higher, runner_up_ask=runner_up_ask, limit=bound)


@given(ASKS, st.integers(1, TASK_UNIT_MICROS_MAX), st.integers(1, 65_536), st.data())
def test_pay_is_never_more_than_reserved_and_nothing_for_failed_rows(
    price: int, unit_micros: int, rows: int, data: st.DataObject
) -> None:
    rows_failed = data.draw(st.integers(0, rows))
    reserved = reservation(price, unit_micros)
    paid = pay(reserved, rows=rows, rows_failed=rows_failed)
    assert 0 <= paid <= reserved < 2**63
    assert pay(reserved, rows=rows, rows_failed=0) == reserved
    assert pay(reserved, rows=rows, rows_failed=rows) == 0
    assert reserved * 1_000_000 >= price * unit_micros
