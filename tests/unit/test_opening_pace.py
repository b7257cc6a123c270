"""Sessions open a few at a time, and dear ones leave room for others."""

from __future__ import annotations

import asyncio

import pytest

from fallow_coordinator.service.opening_pace import OPENINGS_AT_ONCE, ROOM_S_MAX, ROOM_S_PER_EVENT, OpeningPace


class Clock:
    """Seconds that pass only when somebody sleeps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 100.0
        really = asyncio.sleep

        async def sleep(seconds: float) -> None:
            self.now_s += seconds
            await really(0)

        monkeypatch.setattr(asyncio, "sleep", sleep)

    def __call__(self) -> float:
        return self.now_s


async def test_idle_sessions_open_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    pace = OpeningPace(clock)
    for _ in range(1_000):
        async with pace.turn():
            pace.led_to(1)
    assert clock.now_s - 100.0 <= 1_000 * ROOM_S_PER_EVENT * 1.01


async def test_a_session_that_brought_much_leaves_room_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    pace = OpeningPace(clock)
    async with pace.turn():
        pace.led_to(256)
    assert clock.now_s == 100.0, "its own opening waited for nobody"
    async with pace.turn():
        pace.led_to(10**6)
    assert clock.now_s == pytest.approx(100.0 + 256 * ROOM_S_PER_EVENT)
    before = clock.now_s
    async with pace.turn():
        pass
    assert clock.now_s == pytest.approx(before + ROOM_S_MAX), "there is an end to it"


async def test_few_open_at_once_in_the_order_of_their_coming() -> None:
    pace = OpeningPace(asyncio.get_running_loop().time)
    inside: list[int] = []
    most = 0
    go_on = asyncio.Event()

    async def opening(number: int) -> None:
        nonlocal most
        async with pace.turn():
            inside.append(number)
            most = max(most, len(inside))
            await go_on.wait()
            inside.remove(number)
            order.append(number)

    order: list[int] = []
    waiting = [asyncio.create_task(opening(number)) for number in range(3 * OPENINGS_AT_ONCE)]
    for _ in range(10):
        await asyncio.sleep(0)
    assert inside == list(range(OPENINGS_AT_ONCE))
    waiting[OPENINGS_AT_ONCE].cancel()
    go_on.set()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert most == OPENINGS_AT_ONCE
    assert order == [number for number in range(3 * OPENINGS_AT_ONCE) if number != OPENINGS_AT_ONCE]
