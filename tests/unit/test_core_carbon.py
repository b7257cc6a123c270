"""Energy on receipts, and jobs that wait for clean electricity, in the real core."""

from __future__ import annotations

import dataclasses
import math

import pytest

from fallow.errors import FallowError, Reason
from fallow.ids import JobId, PartyId
from fallow.job import Footprint, JobOptions, JobState, Objective
from fallow.session import Cause, EnergySource, Usage
from fallow_coordinator.core import commands as c
from fallow_coordinator.core import events as e
from fallow_coordinator.core.carbon import ELSEWHERE
from fallow_coordinator.core.limits import (
    FORECAST_REGIONS_MAX,
    HOUR_MS,
    MINUTE_MS,
    SECOND_MS,
    WATTS_PER_NODE_MAX,
)
from simulation.core_world import World, capability

START = 1_000 * HOUR_MS
CLEAN_LATER = (300, 300, 300, 100, *[300] * 20)


def world_at(*grams: int, **regions: tuple[int, ...]) -> World:
    """A world with an inspected bundle, at the beginning of an hour that is forecast."""
    world = World(now_ms=START - HOUR_MS).start().ready_bundle(per_row=1_000_000)
    world.now_ms = START
    tell(world, grams or (400,), **regions)
    return world


def tell(world: World, grams: tuple[int, ...], **regions: tuple[int, ...]) -> None:
    told = [e.RegionForecast(name, curve) for name, curve in regions.items()]
    from_ms = world.now_ms - world.now_ms % HOUR_MS
    world.take(c.RecordForecasts(from_ms, (*told, e.RegionForecast(ELSEWHERE, grams)), "test"))


def worker_in(world: World, region: str, *, slots: int = 1, window: int = 2) -> PartyId:
    worker_id = world.enroll(f"worker in {region}").party_id
    world.connect(worker_id, window=window, able=dataclasses.replace(capability(slots=slots), region=region))
    return worker_id


def submit(world: World, rows: int = 60, *, hours: float = 0, key: str = "key", **changes: object) -> JobId:
    deadline_ms = world.now_ms + int(hours * HOUR_MS) if hours else 0
    options = JobOptions(objective=Objective.CARBON, deadline_ms=deadline_ms)
    return world.submit(rows, key=key, options=dataclasses.replace(options, **changes))  # type: ignore[arg-type]


def settle(world: World, worker_id: PartyId, usage: Usage) -> Footprint:
    lease = world.leases_of(worker_id)[0]
    turn = world.take(world.commit_command(lease, usage=usage))
    return next(event.footprint for event in turn.events if isinstance(event, e.TaskSettled))


# ------------------------------------------------------------------------------------------------- energy


def test_energy_is_summed_for_the_job_its_account_and_the_worker() -> None:
    world = world_at(360, de=(720,))
    here, there = worker_in(world, "de"), worker_in(world, "nowhere")
    job_id = world.submit(8)
    world.pack_all()
    world.now_ms += MINUTE_MS
    first = settle(world, here, Usage(energy_joules=10.0, energy_source=EnergySource.MEASURED))
    second = settle(world, there, Usage(energy_joules=5.0, energy_source=EnergySource.ESTIMATED))
    assert first == Footprint(10_000, 10_000, 2_000, 0), "10 J at 720 g/kWh are 2 mg"
    assert second == Footprint(5_000, 0, 500, 0), "a region that is not forecast counts as elsewhere"
    job = world.state.jobs[job_id]
    assert job.footprint == first.plus(second) == world.state.accounts[job.account_id].footprint
    assert world.state.workers[here].footprint == first
    status = world.status(job_id)
    assert status.footprint.joules_per_1000_rows(job.rows) == pytest.approx(15_000 / 8)
    assert [result.footprint for result in job.results] == [first, second]
    assert world.replayed() == world.state


def test_without_a_forecast_nobody_knows_what_energy_emitted() -> None:
    world = World().start().ready_bundle()
    worker_id = world.volunteer("one")
    world.submit(4)
    world.pack_all()
    found = settle(world, worker_id, Usage(energy_joules=1.0, energy_source=EnergySource.ESTIMATED))
    assert found == Footprint(1_000, 0, 0, 1_000)


@pytest.mark.parametrize("joules", [math.nan, math.inf, -math.inf, -1.0, 0.0])
def test_what_is_no_energy_counts_for_nothing(joules: float) -> None:
    world = world_at()
    worker_id = worker_in(world, "de")
    world.submit(4)
    world.pack_all()
    assert settle(world, worker_id, Usage(energy_joules=joules, energy_source=EnergySource.MEASURED)) == Footprint()


def test_absurd_energy_is_cut_off_and_not_measured() -> None:
    world = world_at()
    worker_id = worker_in(world, "de")
    world.submit(4)
    world.pack_all()
    world.now_ms += 9 * SECOND_MS
    found = settle(world, worker_id, Usage(energy_joules=1e300, energy_source=EnergySource.MEASURED))
    assert found.millijoules == WATTS_PER_NODE_MAX * 10 * SECOND_MS
    assert found.millijoules_measured == 0


def test_energy_without_a_source_is_not_taken_for_any() -> None:
    world = world_at()
    worker_id = worker_in(world, "de")
    world.submit(4)
    world.pack_all()
    assert settle(world, worker_id, Usage(energy_joules=5.0)) == Footprint()


def test_an_uploaded_output_settles_with_the_energy_of_its_commitment() -> None:
    world = world_at(360)
    worker_id = worker_in(world, "de")
    world.submit(4)
    world.pack_all()
    lease = world.leases_of(worker_id)[0]
    usage = Usage(energy_joules=10.0, energy_source=EnergySource.MEASURED)
    world.take(world.commit_command(lease, inline=False, usage=usage))
    turn = world.take(world.deliver_command(lease))
    assert next(event.footprint for event in turn.events if isinstance(event, e.TaskSettled)).micrograms == 1_000


# ------------------------------------------------------------------------------------------------- forecasts


@pytest.mark.parametrize(
    ("from_ms", "count", "grams"),
    [(START + 1, 1, (5,)), (-HOUR_MS, 1, (5,)), (START, 1, ()), (START, 1, (5,) * 49), (START, 1, (-1,)),
     (START, 1, (10**6,)), (START, FORECAST_REGIONS_MAX + 1, (5,))],
)  # fmt: skip
def test_absurd_forecasts_are_refused(from_ms: int, count: int, grams: tuple[int, ...]) -> None:
    world = World().start()
    told = tuple(e.RegionForecast(f"region-{number}", grams) for number in range(count))
    with pytest.raises(FallowError) as caught:
        world.take(c.RecordForecasts(from_ms, told, "test"))
    assert caught.value.reason in (Reason.FIELD_INVALID, Reason.LIMIT_EXCEEDED)


def test_the_same_forecast_again_writes_nothing() -> None:
    world = world_at(*CLEAN_LATER, de=(1, 2))
    before = world.state.sequence
    tell(world, CLEAN_LATER, de=(1, 2))
    assert world.state.sequence == before


# ------------------------------------------------------------------------------------------------- waiting


def test_a_job_waits_for_the_clean_hour_says_so_and_runs_then() -> None:
    world = world_at(*CLEAN_LATER)
    worker_id = worker_in(world, "de")
    job_id = submit(world, hours=10)
    assert world.state.jobs[job_id].deferred_until_ms == START, "held back until it is planned"
    world.pass_time(250)
    assert world.status(job_id).deferred_until_ms == START + 3 * HOUR_MS
    world.pack_all()
    assert not world.leases_of(worker_id)
    status = world.status(job_id)
    assert (status.state, status.reason_code) == (JobState.QUEUED, "DEFERRED")
    assert status.reason == "it waits for cleaner electricity: 100 g/kWh then, 300 g/kWh now"
    world.pass_time(3 * HOUR_MS - 1_000)
    assert world.status(job_id).deferred_until_ms
    world.pass_time(1_000)
    assert not world.status(job_id).deferred_until_ms
    world.pack_all()
    assert world.leases_of(worker_id)
    world.work_off()
    assert world.status(job_id).state is JobState.SUCCEEDED
    assert world.replayed() == world.state


def test_other_objectives_do_not_wait() -> None:
    world = world_at(*CLEAN_LATER)
    worker_id = worker_in(world, "de")
    for objective in (Objective.COST, Objective.SPEED):
        job_id = submit(world, hours=10, key=objective.value, objective=objective)
        world.pass_time(250)
        assert not world.status(job_id).deferred_until_ms
    world.pack_all()
    assert world.leases_of(worker_id)


def test_a_near_deadline_does_not_wait_and_one_without_waits_a_day() -> None:
    world = world_at(*CLEAN_LATER)
    worker_in(world, "de")
    near, none = submit(world, hours=0.5, key="near"), submit(world, key="none")
    world.pass_time(250)
    assert not world.status(near).deferred_until_ms
    assert world.status(none).deferred_until_ms == START + 3 * HOUR_MS


def test_without_a_forecast_nothing_is_held_back() -> None:
    world = World().start().ready_bundle()
    worker_id = world.volunteer("one")
    job_id = submit(world, hours=10)
    world.pack_all()
    assert world.leases_of(worker_id) and not world.status(job_id).deferred_until_ms


def test_a_running_job_stops_being_cut_when_a_dirty_hour_comes() -> None:
    world = world_at(100, *[300] * 6, *[100] * 10)
    worker_id = worker_in(world, "de")
    job_id = submit(world, 6_000, hours=16)
    world.pass_time(250)
    world.pack_all()
    held = world.leases_of(worker_id)
    assert held and not world.status(job_id).deferred_until_ms
    world.pass_time(HOUR_MS)
    assert world.status(job_id).deferred_until_ms == START + 7 * HOUR_MS
    for lease in held:
        if lease.lease_id in world.state.leases:
            world.take(world.commit_command(lease))
    world.pack_all()
    assert not world.leases_of(worker_id), "what was leased was finished, nothing more is"
    world.now_ms = START + 7 * HOUR_MS
    tell(world, (100,) * 10)
    world.take(c.Tick())
    world.pack_all()
    assert world.leases_of(worker_id)


def test_the_cleaner_region_gets_the_work_and_the_dirty_one_none() -> None:
    world = world_at(481, se=(40,) * 24, pl=(700,) * 24)
    clean, dirty = worker_in(world, "se"), worker_in(world, "pl")
    job_id = submit(world, 600, hours=20)
    world.pass_time(250)
    lane = world.state.lanes[world.state.jobs[job_id].lane]
    assert lane.regions_closed == {"pl"}
    world.pack_all()
    assert world.leases_of(clean) and not world.leases_of(dirty)
    world.submit(600, key="another")
    world.pack_all()
    assert world.leases_of(dirty), "other work may go there"


def test_both_regions_work_when_time_is_short_the_cleaner_first() -> None:
    world = world_at(481, se=(40,) * 24, pl=(700,) * 24)
    dirty, clean = worker_in(world, "pl"), worker_in(world, "se")
    submit(world, 3_000, hours=1)
    world.pass_time(250)
    world.pack_all()
    granted = [event.worker_id for _, event in world.records if isinstance(event, e.LeaseGranted)]
    assert set(granted[-4:]) == {clean, dirty}
    assert world.leases_of(dirty)


def test_a_task_that_failed_in_the_clean_region_may_go_to_the_dirty_one() -> None:
    world = world_at(481, se=(40,) * 24, pl=(50,) * 24)
    clean, dirty = worker_in(world, "se", window=1), worker_in(world, "pl", window=1)
    submit(world, 4, hours=20)
    world.pass_time(250)
    world.pack_all()
    (lease,) = world.leases_of(clean)
    assert next(iter(world.state.lanes.values())).regions_closed == {"pl"}
    world.take(world.fail_command(lease, Cause.WORKER))
    world.pass_time(MINUTE_MS)
    world.pack_all()
    assert world.leases_of(dirty)


def test_a_job_that_waits_is_cancelled_deleted_and_replayed() -> None:
    world = world_at(*CLEAN_LATER)
    worker_in(world, "de")
    job_id = submit(world, hours=10)
    world.pass_time(250)
    world.take(c.CancelJob(world.account_id, job_id))
    assert world.status(job_id).state is JobState.CANCELLED
    assert not world.state.deferred and not world.state.carbon_jobs and not world.state.lanes
    assert world.replayed() == world.state


def test_when_the_workers_leave_waiting_is_planned_anew() -> None:
    world = world_at(*CLEAN_LATER)
    worker_in(world, "de")
    job_id = submit(world, hours=10)
    world.pass_time(250)
    assert world.status(job_id).deferred_until_ms
    session_id = next(iter(world.state.sessions))
    world.take(c.CloseSession(session_id, "gone"))
    world.pass_time(MINUTE_MS)
    assert not world.status(job_id).deferred_until_ms, "with nobody there, waiting for clean hours helps nobody"


def test_plans_are_written_once_a_minute_and_only_while_jobs_may_wait() -> None:
    world = world_at(*CLEAN_LATER)
    worker_in(world, "de")
    before = world.state.sequence
    for _ in range(8):
        world.pass_time(250)
    assert world.state.sequence == before
    submit(world, hours=10)
    world.pass_time(250)
    planned = world.state.sequence
    for _ in range(100):
        world.pass_time(250)
    assert world.state.sequence == planned
    world.pass_time(MINUTE_MS)
    assert world.state.sequence == planned + 1
