"""Fair share by decayed usage, and due times."""

from __future__ import annotations

from collections import Counter
from math import log2

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fallow.ids import AccountId
from fallow.job import JobOptions
from fallow_coordinator.core import commands as c
from fallow_coordinator.core.answers import AccountMade
from fallow_coordinator.core.limits import DAY_MS, HOUR_MS, SHARE_FLOOR_UNITS, SHARE_HALF_LIFE_MS, UNIT_MICROS
from fallow_coordinator.core.shares import MICRO_BITS, due_ms, share_key_after, usage_units
from simulation.core_world import World

NOW = 1_700_000_000_000


@given(
    done=st.lists(st.tuples(st.integers(0, DAY_MS), st.integers(1, 10**12)), min_size=1, max_size=30),
    later_ms=st.integers(0, 3 * DAY_MS),
)
def test_the_key_is_the_logarithm_of_what_a_plain_decay_gives(done: list[tuple[int, int]], later_ms: int) -> None:
    key, now_ms, usage, last_ms = 0, NOW, 0.0, NOW
    floor = SHARE_FLOOR_UNITS * UNIT_MICROS
    for wait_ms, unit_micros in done:
        now_ms += wait_ms
        key = share_key_after(key, unit_micros, now_ms)
        usage = max(floor, usage * 0.5 ** ((now_ms - last_ms) / SHARE_HALF_LIFE_MS)) + unit_micros
        last_ms = now_ms
    expected = (log2(usage) + now_ms / SHARE_HALF_LIFE_MS) * MICRO_BITS
    assert abs(key - expected) <= len(done) + 1
    decayed = usage * 0.5 ** (later_ms / SHARE_HALF_LIFE_MS) / UNIT_MICROS
    assert usage_units(key, now_ms + later_ms) == pytest.approx(max(0, decayed - SHARE_FLOOR_UNITS), rel=1e-3, abs=1)


@given(
    mine=st.integers(10**9, 10**13),
    theirs=st.integers(10**9, 10**13),
    at=st.integers(0, DAY_MS),
    later=st.integers(1, DAY_MS),
)
def test_the_order_of_accounts_does_not_change_by_waiting(mine: int, theirs: int, at: int, later: int) -> None:
    a, b = share_key_after(0, mine, NOW), share_key_after(0, theirs, NOW + at)
    ordered = usage_units(a, NOW + at) <= usage_units(b, NOW + at)
    much_later = usage_units(a, NOW + at + later) <= usage_units(b, NOW + at + later)
    assert ordered == much_later or abs(a - b) < 10_000


@given(st.integers(0, 10**8), st.integers(0, 10**15), st.integers(1, 10**13))
def test_a_key_always_rises(key: int, unit_micros: int, now_ms: int) -> None:
    assert share_key_after(key, unit_micros, now_ms) > key


def test_priority_is_an_hour_each_and_deadlines_come_earlier() -> None:
    assert due_ms(JobOptions(priority=9), now_ms=NOW, run_ms=0) == NOW
    assert due_ms(JobOptions(), now_ms=NOW, run_ms=0) == NOW + 9 * HOUR_MS
    assert due_ms(JobOptions(deadline_ms=NOW + HOUR_MS), now_ms=NOW, run_ms=60_000) == NOW + HOUR_MS - 60_000
    assert due_ms(JobOptions(priority=9, deadline_ms=NOW + HOUR_MS), now_ms=NOW, run_ms=0) == NOW


def other_account(world: World) -> AccountId:
    made = world.ask(c.CreateAccount("other"))
    assert isinstance(made, AccountMade)
    world.register(made.account_id)
    return made.account_id


def test_who_was_served_less_lately_comes_first_and_half_of_it_is_forgotten_each_day() -> None:
    world = World().start().ready_bundle(per_row=1_000_000)
    other = other_account(world)
    worker = world.volunteer("v", window=1)
    world.submit(2_000, key="first")
    for _ in range(20):
        world.pack_all()
        world.work(worker)
    theirs = world.submit(2_000, key="theirs", account_id=other)
    for _ in range(10):
        world.pack_all()
        world.work(worker)
    turns = [world.state.tasks[lease.task_id].job_id for lease in world.leases_of(worker)]
    assert turns == [theirs], "the other catches up before the first is served again"
    accounts = world.state.accounts
    assert accounts[other].share_key < accounts[world.account_id].share_key
    used = usage_units(accounts[world.account_id].share_key, world.now_ms)
    assert usage_units(accounts[world.account_id].share_key, world.now_ms + DAY_MS) == pytest.approx(
        (used + SHARE_FLOOR_UNITS) / 2 - SHARE_FLOOR_UNITS, rel=0.01
    )


def test_urgent_jobs_of_an_account_go_first_and_old_ones_are_not_forgotten() -> None:
    world = World().start().ready_bundle(per_row=1_000_000)
    slow = world.submit(1_000, key="slow")
    world.now_ms += HOUR_MS
    urgent = world.submit(1_000, key="urgent", options=JobOptions(priority=9))
    world.now_ms += 9 * HOUR_MS
    late = world.submit(1_000, key="late", options=JobOptions(priority=9))
    worker = world.volunteer("v", window=1)
    order: list[str] = []
    while len(set(order)) < 3:
        world.pack_all()
        job_id = world.state.tasks[world.leases_of(worker)[0].task_id].job_id
        assert job_id is not None
        order.append(job_id)
        world.work(worker)
    assert list(dict.fromkeys(order)) == [urgent, slow, late]


def test_three_accounts_with_equal_jobs_get_equal_work() -> None:
    world = World().start().ready_bundle(per_row=1_000_000)
    accounts = [other_account(world)]
    made = world.ask(c.CreateAccount("third"))
    assert isinstance(made, AccountMade)
    world.register(made.account_id)
    accounts.append(made.account_id)
    world.submit(3_000, key="mine")
    for account_id in accounts:
        world.submit(3_000, key=account_id, account_id=account_id)
    workers = [world.volunteer(name, window=2) for name in "abc"]
    rows: Counter[str] = Counter()
    for _ in range(40):
        world.pack_all()
        for worker in workers:
            task = world.state.tasks[world.leases_of(worker)[0].task_id]
            assert task.job_id is not None
            rows[world.state.jobs[task.job_id].account_id] += task.rows
            world.work(worker)
    assert max(rows.values()) < 1.3 * min(rows.values()) and len(rows) == 3
