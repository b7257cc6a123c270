"""Where work stands until it is leased: the indexes of tasks and jobs. Only `evolve` calls what changes them."""

from __future__ import annotations

from bisect import bisect_left, insort

from fallow.ids import AccountId, TaskId
from fallow.job import JobState
from fallow_coordinator.core.groups import fits, note, note_own
from fallow_coordinator.core.state import NO_GROUP, Account, Job, Lane, LaneKey, State, Task, TaskPhase

CUTTABLE = frozenset({JobState.QUEUED, JobState.RUNNING})
"""States in which a job's rows are cut into tasks."""


def lane_of(state: State, key: LaneKey) -> Lane:
    """The lane, made when it is not there."""
    lane = state.lanes.get(key)
    if lane is None:
        lane = state.lanes[key] = Lane()
        for number, group in state.groups.items():
            if fits(key, lane, group):
                lane.groups |= 1 << number
                lane.window_total += group.window_total
    return lane


def close_regions(state: State, key: LaneKey, regions: frozenset[str]) -> None:
    """Work of this lane goes to no worker of these regions from here on, and to all others again."""
    lane = state.lanes[key]
    lane.regions_closed = regions
    lane.groups = lane.window_total = 0
    for number, group in state.groups.items():
        if fits(key, lane, group):
            lane.groups |= 1 << number
            lane.window_total += group.window_total


def wants_cutting(job: Job) -> bool:
    """Whether the job stands in the queue for its rows to be cut."""
    return job.state in CUTTABLE and not job.deferred_until_ms and job.next_row < job.rows


def release_lane(state: State, key: LaneKey) -> None:
    """One job or inspection less in the lane; an empty lane goes."""
    lane = state.lanes[key]
    lane.jobs -= 1
    if not lane.jobs:
        empty = not (lane.accounts or lane.queue or lane.waiting or lane.packing or lane.ready)
        assert empty and key not in state.open_lanes, "an empty lane is empty"
        del state.lanes[key]


# ------------------------------------------------------------------------------------------------- jobs to cut


def join_queue(state: State, job: Job) -> None:
    """The job has rows to cut."""
    lane = state.lanes[job.lane]
    account = state.accounts[job.account_id]
    jobs = lane.accounts.get(job.account_id)
    if jobs is None:
        jobs = lane.accounts[job.account_id] = []
        insort(lane.queue, (account.share_key, job.account_id))
        account.lanes[job.lane] = None
        note_own(state, account)
    insort(jobs, (job.due_ms, job.number, job.job_id))


def leave_queue(state: State, job: Job) -> None:
    """The job has no more rows to cut, or may not be cut now."""
    lane = state.lanes[job.lane]
    account = state.accounts[job.account_id]
    jobs = lane.accounts[job.account_id]
    jobs.remove((job.due_ms, job.number, job.job_id))
    if not jobs:
        del lane.accounts[job.account_id]
        _take_turn(lane, account.share_key, job.account_id)
        del account.lanes[job.lane]
        note_own(state, account)


def move_share(state: State, account: Account, share_key: int) -> None:
    """The account was served: its turn comes later, in every lane."""
    for key in account.lanes:
        lane = state.lanes[key]
        _take_turn(lane, account.share_key, account.account_id)
        insort(lane.queue, (share_key, account.account_id))
    account.share_key = share_key


def _take_turn(lane: Lane, share_key: int, account_id: AccountId) -> None:
    index = bisect_left(lane.queue, (share_key, account_id))
    assert lane.queue[index] == (share_key, account_id), "an account with rows to cut stands in the queue"
    del lane.queue[index]


# ------------------------------------------------------------------------------------------------- tasks


def enter_lane(state: State, task: Task) -> None:
    """The task stands in its lane by its phase; one of a parked job only while it is being packed."""
    lane = state.lanes[task.lane]
    if task.phase is TaskPhase.PACKING:
        lane.packing[task.task_id] = None
        _stock(state, task, lane)
    elif is_parked(state, task):
        return
    elif task.phase is TaskPhase.WAITING:
        insort(lane.waiting, (task.not_before_ms, task.number, task.task_id))
    elif task.phase is TaskPhase.READY:
        entry = (task.stamp, task.number, task.task_id)
        insort(lane.ready, entry)
        state.open_lanes[task.lane] = None
        insort(_account_of(state, task).ready, entry)
        _stock(state, task, lane)


def leave_lane(state: State, task: Task) -> None:
    """Takes the task out of the index of its phase."""
    lane = state.lanes[task.lane]
    if task.phase is TaskPhase.PACKING:
        del lane.packing[task.task_id]
        _unstock(state, task)
    elif is_parked(state, task):
        return
    elif task.phase is TaskPhase.WAITING:
        _take(lane.waiting, (task.not_before_ms, task.number, task.task_id))
    elif task.phase is TaskPhase.READY:
        _take(lane.ready, (task.stamp, task.number, task.task_id))
        if not lane.ready:
            del state.open_lanes[task.lane]
        _take(_account_of(state, task).ready, (task.stamp, task.number, task.task_id))
        _unstock(state, task)


def is_parked(state: State, task: Task) -> bool:
    """Whether the task's job is set aside."""
    return task.job_id is not None and state.jobs[task.job_id].parked


def _account_of(state: State, task: Task) -> Account:
    assert task.job_id is not None, "only rows of jobs are packed"
    return state.accounts[state.jobs[task.job_id].account_id]


def _take(entries: list[tuple[int, int, TaskId]], entry: tuple[int, int, TaskId]) -> None:
    index = bisect_left(entries, entry)
    assert entries[index] == entry, "a task stands where its phase says"
    del entries[index]


def _stock(state: State, task: Task, lane: Lane) -> None:
    """Counts a task as kept for the first group that wants one, else for the first that fits."""
    wanted = lane.groups & state.wanting_groups or lane.groups
    account = _account_of(state, task)
    account.stock += 1
    note_own(state, account)
    if not wanted:
        return
    group = state.groups[(wanted & -wanted).bit_length() - 1]
    task.stock_group = group.number
    group.stock += 1
    group.packing += task.phase is TaskPhase.PACKING
    note(state, group)


def _unstock(state: State, task: Task) -> None:
    account = _account_of(state, task)
    account.stock -= 1
    note_own(state, account)
    if task.stock_group == NO_GROUP:
        return
    group = state.groups[task.stock_group]
    task.stock_group = NO_GROUP
    group.stock -= 1
    group.packing -= task.phase is TaskPhase.PACKING
    note(state, group)
