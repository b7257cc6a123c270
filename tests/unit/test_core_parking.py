"""A paused job's tasks stand outside their lane, whatever happens to them meanwhile, and come back in order."""

from __future__ import annotations

import pytest

from fallow.ids import JobId
from fallow.job import JobState
from fallow.session import Cause
from fallow_coordinator.core import commands as c
from fallow_coordinator.core import events as e
from fallow_coordinator.core import invariants
from fallow_coordinator.core.evolve import evolve
from fallow_coordinator.core.state import TaskPhase
from simulation.core_world import World


@pytest.fixture
def world() -> World:
    return World().start().ready_bundle(per_row=1_000_000)


def move(world: World, job_id: JobId, state: JobState) -> None:
    """As a decision would."""
    event = e.JobStateChanged(job_id=job_id, state=state, reason="no credits left", reason_code="BUDGET_EXHAUSTED")
    evolve(world.state, event, world.now_ms)
    world.records.append((world.now_ms, event))
    invariants.check(world.state)


def test_tasks_of_a_paused_job_are_not_leased_and_those_of_others_are(world: World) -> None:
    worker_id = world.volunteer("worker", window=1)
    paused = world.submit(40, key="first job here")
    world.pack_all()
    move(world, paused, JobState.PAUSED)
    other = world.submit(8, key="second job here")
    world.work_off()
    assert world.status(other).state is JobState.SUCCEEDED
    assert world.status(paused).state is JobState.PAUSED
    assert world.status(paused).reason_code == "BUDGET_EXHAUSTED"
    assert not world.leases_of(worker_id)

    move(world, paused, JobState.RUNNING)
    world.take(c.Tick())
    world.work_off()
    assert world.status(paused).state is JobState.SUCCEEDED
    assert world.replayed() == world.state


def test_packing_and_failures_go_on_while_a_job_is_paused(world: World) -> None:
    worker_id = world.volunteer("worker", window=2)
    job_id = world.submit(40)
    world.pack(next(task_id for lane in world.state.lanes.values() for task_id in lane.packing))
    move(world, job_id, JobState.PAUSED)
    world.pack_all()
    for lease in world.leases_of(worker_id):
        world.take(world.return_command(lease, cause=Cause.OWNER_PREEMPT))
    phases = {world.state.tasks[task_id].phase for task_id in world.state.jobs[job_id].tasks}
    assert phases <= {TaskPhase.READY, TaskPhase.WAITING}
    assert not any(lane.ready or lane.waiting for lane in world.state.lanes.values())

    move(world, job_id, JobState.RUNNING)
    world.pass_time(60_000)
    world.work_off()
    assert world.status(job_id).state is JobState.SUCCEEDED


def test_a_paused_job_can_be_cancelled(world: World) -> None:
    world.volunteer("worker", window=1)
    job_id = world.submit(40)
    world.pack_all()
    move(world, job_id, JobState.PAUSED)
    world.take(c.CancelJob(world.account_id, job_id))
    assert world.status(job_id).state is JobState.CANCELLED
    assert not world.state.tasks and not world.state.lanes
