"""A job set aside: its tasks stand outside their lane until it goes on. Only `evolve` calls what changes this."""

from __future__ import annotations

from fallow_coordinator.core.lanes import enter_lane, leave_lane
from fallow_coordinator.core.state import Job, State, TaskPhase


def park(state: State, job: Job) -> None:
    """Takes the job's waiting and ready tasks out of its lane; what is being packed or leased goes on."""
    assert not job.parked, "a job is parked once"
    for task_id in job.tasks:
        if state.tasks[task_id].phase is not TaskPhase.PACKING:
            leave_lane(state, state.tasks[task_id])
    job.parked = True


def unpark(state: State, job: Job) -> None:
    """Puts the job's waiting and ready tasks back into its lane, the first created first."""
    assert job.parked, "what is parked goes on"
    job.parked = False
    for task_id in job.tasks:
        if state.tasks[task_id].phase is not TaskPhase.PACKING:
            enter_lane(state, state.tasks[task_id])
