"""Hosts that fail get less to do and come back; who is not to blame is not hurt."""

from __future__ import annotations

import pytest

from fallow.ids import PartyId
from fallow.job import JobOptions
from fallow.session import Cause
from fallow_coordinator.core import commands as c
from fallow_coordinator.core import events as e
from fallow_coordinator.core.limits import (
    AMNESTY_MS,
    COOL_DOWN_MS_MAX,
    COOL_DOWN_MS_MIN,
    STRIKES_FREE,
)
from simulation.core_world import World, digest

PATIENT = JobOptions(failed_rows_max=100_000)


def busy_world() -> tuple[World, PartyId, PartyId]:
    """A long job, a worker that is to fail, and a good one with a small window."""
    world = World().start().ready_bundle(per_row=1_000_000)
    bad, good = world.volunteer("bad", window=4), world.volunteer("good", window=1)
    world.submit(5_000, options=PATIENT)
    world.pack_all()
    return world, bad, good


def fail_once(world: World, worker_id: PartyId, cause: Cause = Cause.WORKER) -> None:
    world.take(world.fail_command(world.leases_of(worker_id)[0], cause))
    world.pack_all()


def test_two_failures_cost_nothing_and_the_third_a_rest() -> None:
    world, bad, _ = busy_world()
    for _ in range(STRIKES_FREE):
        fail_once(world, bad)
        assert len(world.leases_of(bad)) == 4
    fail_once(world, bad)
    worker = world.state.workers[bad]
    assert worker.cooling_until_ms == world.now_ms + COOL_DOWN_MS_MIN
    assert worker.free == 0 and len(world.leases_of(bad)) == 3, "it may finish what it holds"


def test_a_rest_doubles_with_each_failure_up_to_its_limit() -> None:
    world, bad, _ = busy_world()
    rests: list[int] = []
    for _ in range(14):
        fail_once(world, bad)
        until_ms = world.state.workers[bad].cooling_until_ms
        if until_ms:
            rests.append(until_ms - world.now_ms)
            world.pass_time(rests[-1])
            world.pack_all()
    assert rests[:3] == [COOL_DOWN_MS_MIN, 2 * COOL_DOWN_MS_MIN, 4 * COOL_DOWN_MS_MIN]
    assert max(rests) == COOL_DOWN_MS_MAX


def test_a_host_proves_itself_with_one_task_and_gets_more_with_each() -> None:
    world, bad, _ = busy_world()
    while world.leases_of(bad):
        fail_once(world, bad)
    strikes = world.state.workers[bad].strikes
    world.pass_time(COOL_DOWN_MS_MAX)
    world.pack_all()
    held = [len(world.leases_of(bad))]
    for _ in range(3):
        world.work(bad)
        world.pack_all()
        held.append(len(world.leases_of(bad)))
    assert held == [1, 2, 4, 4]
    assert world.state.workers[bad].strikes == strikes - 3


@pytest.mark.parametrize("cause", [Cause.ROW, Cause.PLATFORM, Cause.OWNER_PREEMPT])
def test_what_is_not_the_hosts_fault_is_no_strike(cause: Cause) -> None:
    world, bad, _ = busy_world()
    for _ in range(6):
        if world.leases_of(bad):
            fail_once(world, bad, cause)
    assert world.state.workers[bad].strikes == 0
    assert not any(isinstance(event, e.WorkerStruck) for _, event in world.records)


def test_a_host_that_takes_and_never_commits_gets_less() -> None:
    world, bad, good = busy_world()
    for _ in range(4):
        world.pass_time(10 * 3_600_000)
        world.pack_all()
        if world.leases_of(good):
            world.work(good)
    assert world.state.workers[bad].strikes >= STRIKES_FREE + 1
    assert world.state.workers[bad].room <= 1


def test_an_outage_of_ours_is_an_amnesty() -> None:
    world, bad, _ = busy_world()
    world.now_ms += 3_600_000
    world.take(c.Restart(epoch=2, down_time_ms=3_600_000))
    world.pass_time(120_000)
    assert world.state.workers[bad].strikes == 0, "leases from before the outage are forgiven"
    world.connect(bad, window=4, next_token="again")
    world.pack_all()
    assert world.leases_of(bad)
    world.now_ms += AMNESTY_MS
    fail_once(world, bad)
    assert world.state.workers[bad].strikes == 1, "after that the rules hold again"


def test_a_rest_outlasts_the_session_and_replay_gives_the_same() -> None:
    world, bad, _ = busy_world()
    for _ in range(4):
        fail_once(world, bad)
    session_id = world.state.workers[bad].session_id
    assert session_id is not None
    world.take(c.CloseSession(session_id, "bye"))
    world.connect(bad, window=4, token=f"{bad}#1")
    assert world.leases_of(bad) == []
    assert world.replayed() == world.state
    world.pass_time(COOL_DOWN_MS_MAX)
    world.pack_all()
    assert len(world.leases_of(bad)) == 1
    assert digest(world.replayed()) == digest(world.state)
