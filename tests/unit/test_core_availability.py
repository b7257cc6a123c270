"""When workers are there and how long they stay."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from fallow.ids import PartyId
from fallow_coordinator.core import commands as c
from fallow_coordinator.core.availability import HOURS_OF_WEEK, comes, goes, stays_permille
from fallow_coordinator.core.limits import DAY_MS, HOUR_MS, MINUTE_MS, STAY_GAP_MS, WEEK_MS, WEEKS_REMEMBERED
from fallow_coordinator.core.state import Stays, Worker
from simulation.core_world import World

MONDAY = 2_800 * WEEK_MS + 4 * DAY_MS
"""1970 began on a Thursday."""


def worker_with(stays: Stays, world: World | None = None) -> Worker:
    world = world or World().start()
    return replace(world.state.workers[world.volunteer("v")], stays=stays)


def life(*spans: tuple[int, int]) -> Stays:
    """A worker that was there in these spans."""
    stays = Stays()
    for start_ms, end_ms in spans:
        comes(stays, start_ms)
        goes(stays, end_ms, cut_off=False)
    return stays


def office(weeks: int) -> Stays:
    """There from nine to five on working days."""
    days = [MONDAY + week * WEEK_MS + day * DAY_MS for week in range(weeks) for day in range(5)]
    return life(*((day + 9 * HOUR_MS, day + 17 * HOUR_MS) for day in days))


def test_nobody_known_is_trusted_for_minutes_and_less_for_hours() -> None:
    stays = Stays()
    comes(stays, MONDAY)
    worker = worker_with(stays)
    soon, later, much_later = (stays_permille(worker, MONDAY, ms) for ms in (MINUTE_MS, HOUR_MS, DAY_MS))
    assert 1_000 > soon > later > much_later > 0


def test_an_office_machine_is_there_in_the_morning_and_gone_in_the_evening() -> None:
    stays = office(weeks=4)
    monday = MONDAY + 4 * WEEK_MS
    comes(stays, monday + 9 * HOUR_MS)
    worker = worker_with(stays)
    morning = stays_permille(worker, monday + 10 * HOUR_MS, 2 * HOUR_MS)
    evening = stays_permille(worker, monday + 16 * HOUR_MS, 2 * HOUR_MS)
    assert morning > 600 > 300 > evening


def test_who_always_left_after_minutes_is_given_nothing_for_hours() -> None:
    flighty = life(*((MONDAY + n * HOUR_MS, MONDAY + n * HOUR_MS + 4 * MINUTE_MS) for n in range(40)))
    steady = life(*((MONDAY + n * DAY_MS, MONDAY + n * DAY_MS + 23 * HOUR_MS) for n in range(4)))
    now_ms = MONDAY + 10 * DAY_MS
    for stays in (flighty, steady):
        comes(stays, now_ms)
    assert stays_permille(worker_with(flighty), now_ms, HOUR_MS) < 50
    assert stays_permille(worker_with(steady), now_ms, HOUR_MS) > 500


def test_a_short_break_goes_on_and_a_restart_of_ours_ends_no_stay() -> None:
    stays = life((MONDAY, MONDAY + HOUR_MS), (MONDAY + HOUR_MS + STAY_GAP_MS, MONDAY + 2 * HOUR_MS))
    assert sum(stays.ends) == 0 and stays.since_ms == MONDAY
    goes_by_us = Stays()
    comes(goes_by_us, MONDAY)
    goes(goes_by_us, MONDAY + HOUR_MS, cut_off=True)
    comes(goes_by_us, MONDAY + 5 * HOUR_MS)
    assert sum(goes_by_us.ends) == 0 and sum(goes_by_us.at_risk) > 0


@given(st.lists(st.tuples(st.integers(0, 40 * HOUR_MS), st.integers(0, 300 * HOUR_MS)), max_size=40))
def test_counts_stay_in_bounds_whatever_happens(spans: list[tuple[int, int]]) -> None:
    stays, moment = Stays(), MONDAY
    for away_ms, there_ms in spans:
        moment += away_ms
        comes(stays, moment)
        moment += there_ms
        goes(stays, moment, cut_off=False)
    assert all((0 <= hour < HOURS_OF_WEEK and minutes > 0) or minutes == 0 for hour, minutes in stays.minutes.items())
    assert all(0 <= ended <= risked for ended, risked in zip(stays.ends, stays.at_risk, strict=True))
    weeks = (moment - MONDAY) // WEEK_MS + 2
    assert max(stays.minutes.values(), default=0) <= 61 * min(weeks, 2 * WEEKS_REMEMBERED + 2)


def test_a_long_task_goes_to_who_stays() -> None:
    world = World().start().ready_bundle(per_row=1_000_000_000)
    flighty, steady = world.volunteer("flighty", window=1), world.volunteer("steady", window=1)

    def leave(worker_id: PartyId) -> None:
        session_id = world.state.workers[worker_id].session_id
        assert session_id is not None
        world.take(c.CloseSession(session_id, "bye"))

    for turn in range(20):
        world.now_ms += 2 * MINUTE_MS
        leave(flighty)
        world.now_ms += 2 * STAY_GAP_MS
        world.connect(flighty, window=1, next_token=f"flighty {turn}")
    world.submit(1)
    world.pack_all()
    assert [len(world.leases_of(worker_id)) for worker_id in (flighty, steady)] == [0, 1]
    assert world.replayed() == world.state
