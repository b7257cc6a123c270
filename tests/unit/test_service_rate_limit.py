"""Buckets and paces: what is spent, what is owed, who is forgotten."""

from __future__ import annotations

import asyncio

import pytest

from fallow.errors import FallowError, Reason
from fallow_coordinator.service.rate_limit import Pace, RateLimit


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def overloaded(limit: RateLimit, peer: str, cost: float = 1.0) -> bool:
    try:
        limit.take(peer, cost)
    except FallowError as error:
        assert error.reason is Reason.OVERLOADED
        return True
    return False


def test_a_dear_call_leaves_a_debt_that_time_pays() -> None:
    clock = Clock()
    limit = RateLimit(per_s=10, burst=20, peers_max=5, clock=clock)
    assert not overloaded(limit, "a", cost=120)
    assert overloaded(limit, "a")
    assert not overloaded(limit, "b"), "peers have buckets of their own"
    clock.now = 10.0
    assert overloaded(limit, "a"), "100 owed, 100 paid"
    clock.now = 10.2
    assert not overloaded(limit, "a")


def test_refusals_cost_nothing_and_idle_time_fills_no_further_than_the_burst() -> None:
    clock = Clock()
    limit = RateLimit(per_s=1, burst=3, peers_max=5, clock=clock)
    assert [overloaded(limit, "a") for _ in range(6)] == [False] * 3 + [True] * 3
    clock.now = 1_000.0
    assert [overloaded(limit, "a") for _ in range(4)] == [False] * 3 + [True]


async def test_a_stream_that_is_too_fast_waits_for_as_long_as_it_owes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, waits = Clock(), list[float]()

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        clock.now += seconds

    monkeypatch.setattr(asyncio, "sleep", sleep)
    pace = Pace(per_s=10, burst=5, clock=clock)
    for _ in range(5):
        await pace.keep(1.0)
    assert waits == []
    await pace.keep(1.0)
    await pace.keep(20.0)
    assert waits == pytest.approx([0.1, 2.0])
    clock.now += 100.0
    await pace.keep(5.0)
    assert len(waits) == 2
