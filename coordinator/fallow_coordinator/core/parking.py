"""A job set aside: its tasks stand outside their lane until it goes on. Only `evolve` calls what changes this."""

from __future__ import annotations

from bisect import bisect_left, insort

from fallow_coordinator.core.state import Job, State, Task, TaskPhase


def park(state: State, job: Job) -> None:
    """Takes the job's waiting and ready tasks out of its lane; what is being packed or leased goes on."""
    assert not job.parked, "a job is parked once"
    for task_id in job.tasks:
        leave_lane(state, state.tasks[task_id])
    job.parked = True


def unpark(state: State, job: Job) -> None:
    """Puts the job's waiting and ready tasks back into its lane, the first created first."""
    assert job.parked, "what is parked goes on"
    job.parked = False
    for task_id in job.tasks:
        enter_lane(state, state.tasks[task_id])


def enter_lane(state: State, task: Task) -> None:
    """The task stands in its lane's index of waiting or ready ones, unless its job is parked."""
    if _is_parked(state, task):
        return
    lane = state.lanes[task.lane]
    if task.phase is TaskPhase.WAITING:
        insort(lane.waiting, (task.not_before_ms, task.number, task.task_id))
    elif task.phase is TaskPhase.READY:
        lane.ready[task.task_id] = None


def leave_lane(state: State, task: Task) -> None:
    """Takes the task out of its lane's index of waiting or ready ones; one of a parked job stands in none."""
    if _is_parked(state, task):
        return
    lane = state.lanes[task.lane]
    if task.phase is TaskPhase.WAITING:
        entry = (task.not_before_ms, task.number, task.task_id)
        index = bisect_left(lane.waiting, entry)
        assert lane.waiting[index] == entry, "a waiting task stands in its lane"
        del lane.waiting[index]
    elif task.phase is TaskPhase.READY:
        del lane.ready[task.task_id]


def _is_parked(state: State, task: Task) -> bool:
    return task.job_id is not None and state.jobs[task.job_id].parked
