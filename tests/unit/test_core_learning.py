"""What accepted work teaches of a bundle's cost: bounded, for jobs to come, never for one that runs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fallow.cost import SizeBin
from fallow.ids import JobId
from fallow.quote import QuoteRequest
from fallow.roles import DataClass
from fallow.session import Usage
from fallow_coordinator.core import learning
from fallow_coordinator.core.events import BundleCostLearned, TaskSettled
from fallow_coordinator.core.limits import COST_PERMILLE_MAX, COST_PERMILLE_MIN, LEARNED_SETTLEMENTS
from fallow_coordinator.core.quotes import quote
from simulation.core_world import World

UNIT = 1_000_000
SPEED = 2_000
"""Two units a second, in thousandths."""


@pytest.fixture(autouse=True)
def measured_at_two_units_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """How devices come to be measured is told elsewhere."""
    monkeypatch.setattr(learning, "measured", lambda worker: True)
    monkeypatch.setattr(learning, "speed_measured", lambda worker: SPEED)


def one_unit_a_row() -> World:
    world = World().start().ready_bundle(per_row=UNIT, batch=1)
    world.volunteer("v", window=1)
    return world


def work(world: World, tasks: int, *, seconds_for_each_unit: float) -> None:
    """The worker does so many tasks, each in so much time."""
    for _ in range(tasks):
        world.pack_all()
        lease = next(iter(world.state.leases.values()))
        took_ms = round(world.state.tasks[lease.task_id].unit_micros / UNIT * seconds_for_each_unit * 1_000)
        world.now_ms = max(world.now_ms, lease.granted_at_ms + took_ms)
        world.take(world.commit_command(lease, usage=Usage(wall_microseconds=took_ms * 1_000)))


def permille(world: World) -> int:
    return world.state.bundles[world.bundle_digest].cost_permille


def learned(world: World) -> list[int]:
    return [event.cost_permille for _, event in world.records if isinstance(event, BundleCostLearned)]


def quoted_units(world: World, rows: int) -> int:
    request = QuoteRequest(world.bundle_digest, (SizeBin(rows, ()),), DataClass.PUBLIC, world.state.default_pool_id)
    return quote(world.state, world.account_id, request, world.now_ms).unit_micros


def cost_of(world: World, job_id: JobId) -> int:
    return world.state.jobs[job_id].cost_permille


def test_work_that_takes_twice_as_long_as_estimated_costs_more_in_the_next_job() -> None:
    world = one_unit_a_row()
    running = world.submit(10_000, key="running")
    work(world, LEARNED_SETTLEMENTS - 1, seconds_for_each_unit=1.0)
    assert (permille(world), learned(world)) == (1_000, [])
    work(world, 1, seconds_for_each_unit=1.0)
    assert (permille(world), learned(world)) == (1_250, [1_250]), "a quarter of the way to twice"
    assert cost_of(world, running) == 1_000
    assert quoted_units(world, 100) == 125 * UNIT
    following = world.submit(100, key="following")
    assert cost_of(world, following) == 1_250
    assert world.replayed() == world.state


def test_a_corrected_job_teaches_about_what_inspection_found() -> None:
    world = one_unit_a_row()
    for turn in range(12):
        job_id = world.submit(10_000, key=f"job {turn}")
        # Truly 1.5 units a row at two units a second, whatever the job was estimated at.
        work(world, LEARNED_SETTLEMENTS, seconds_for_each_unit=0.75 * 1_000 / cost_of(world, job_id))
        cancel(world, job_id)
    assert 1_450 <= permille(world) <= 1_550, learned(world)


def cancel(world: World, job_id: JobId) -> None:
    from fallow_coordinator.core import commands as c

    world.take(c.CancelJob(world.account_id, job_id))


def test_work_on_devices_that_nobody_measured_teaches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "measured", lambda worker: False)
    world = one_unit_a_row()
    world.submit(10_000)
    work(world, 2 * LEARNED_SETTLEMENTS, seconds_for_each_unit=3.0)
    assert (permille(world), learned(world)) == (1_000, [])
    settled = [event for _, event in world.records if isinstance(event, TaskSettled) and event.cursor]
    assert settled and all(event.worked_unit_micros == 0 for event in settled)


def test_absurd_times_are_cut_off() -> None:
    world = one_unit_a_row()
    world.submit(10_000)
    work(world, LEARNED_SETTLEMENTS, seconds_for_each_unit=19.0)
    assert learned(world) == [(3 * 1_000 + 8_000) // 4]


@given(
    st.integers(COST_PERMILLE_MIN, COST_PERMILLE_MAX),
    st.integers(0, 10**18),
    st.integers(1, 10**18),
    st.integers(1, 10**15),
    st.integers(1, 10**15),
)
def test_corrections_stay_within_their_bounds(
    now: int, worked_so_far: int, inspected_so_far: int, worked: int, inspected: int
) -> None:
    bundle = World().start().ready_bundle().state.bundles.popitem()[1]
    bundle.cost_permille, bundle.learning_tasks = now, LEARNED_SETTLEMENTS
    bundle.learning_worked, bundle.learning_inspected = worked_so_far, inspected_so_far
    told = learning.learned(bundle, inspected=inspected, worked=worked)
    assert told is not None
    assert COST_PERMILLE_MIN <= told.cost_permille <= COST_PERMILLE_MAX
