"""What can start now: one step at a time, found by looking at the state. Ties go by number and by identifier."""

from __future__ import annotations

from collections.abc import Iterable

from fallow.credits import PoolMode
from fallow.ids import JobId, LeaseId, PartyId, TaskId
from fallow.job import JobState
from fallow.session import TaskKind
from fallow_coordinator.core import events as e
from fallow_coordinator.core.cutting import Cost, Layout, cut_size, unit_micros
from fallow_coordinator.core.evolve_tasks import submitter_of
from fallow_coordinator.core.funding import Shortage, Terms, ask_of, is_affordable, is_own, lease_terms, pausing
from fallow_coordinator.core.groups import groups_of_lane
from fallow_coordinator.core.limits import (
    INSPECTION_RUNTIME_MS,
    RUNTIME_FACTOR,
    RUNTIME_MS_MAX,
    RUNTIME_MS_MIN,
    TASK_UNIT_MICROS_MAX,
    TRANSFER_BYTES_PER_MS_MIN,
    UNIT_MICROS,
)
from fallow_coordinator.core.names import Names
from fallow_coordinator.core.state import Job, Lane, LaneKey, State, Task, Worker, WorkerGroup


def next_step(state: State, now_ms: int, names: Names) -> tuple[e.Event, ...]:
    """Events that start one more piece of work: a lease, or a packing, or a fresh task; none when nothing can start."""
    chosen: tuple[Task, Worker, Terms] | None = None
    short: dict[JobId, Shortage] = {}
    for key, lane in state.lanes.items():
        if not lane.ready and key.kind is not TaskKind.INSPECT:
            continue
        pair = _first_pair(state, key, lane, now_ms, short)
        if pair is not None and (chosen is None or pair[0].number < chosen[0].number):
            chosen = pair
    if chosen is not None:
        return _grant(state, *chosen, now_ms, names)
    for job_id, shortage in short.items():
        paused = pausing(state, job_id, shortage)
        if paused is not None:
            return (paused,)
    for key, lane in state.lanes.items():
        if key.kind is TaskKind.INSPECT or not (lane.waiting or lane.accounts):
            continue
        groups = _groups(state, key)
        demand = sum(group.free_total + group.ahead_total for group in groups)
        if len(lane.packing) + len(lane.ready) >= demand:
            continue
        if lane.waiting and lane.waiting[0][0] <= now_ms:
            task = state.tasks[lane.waiting[0][2]]
            return (e.PackRequested(task_id=task.task_id, pack_number=task.pack_number + 1),)
        if lane.accounts:
            job_id = next(iter(next(iter(lane.accounts.values()))))
            return _cut(state, state.jobs[job_id], sum(group.window_total for group in groups), names)
    return ()


def _groups(state: State, key: LaneKey) -> list[WorkerGroup]:
    return [state.groups[group] for group in groups_of_lane(key) if group in state.groups]


def _first_pair(
    state: State, key: LaneKey, lane: Lane, now_ms: int, short: dict[JobId, Shortage]
) -> tuple[Task, Worker, Terms] | None:
    """The first task of a lane that a free worker may take and its job can pay, that worker, and what it costs.

    Jobs that can't pay are added to `short`.
    """
    groups = _groups(state, key)
    if not any(group.free for group in groups):
        return None
    task_ids: Iterable[TaskId] = lane.ready
    if key.kind is TaskKind.INSPECT:
        task_ids = _inspections(state, lane, now_ms)
    for task_id in task_ids:
        task = state.tasks[task_id]
        job = state.jobs[task.job_id] if task.job_id is not None else None
        if job is not None and job.job_id in short:
            continue
        runner_up_ask = None
        if job is not None and job.mode is PoolMode.MARKET:
            worker_id, runner_up_ask = _pick_by_ask(state, groups, task, job)
        else:
            worker_id = _pick(state, groups, task)
        if worker_id is None:
            continue
        worker = state.workers[worker_id]
        terms = lease_terms(state, task, worker, runner_up_ask)
        if isinstance(terms, Terms):
            return task, worker, terms
        assert job is not None, "only jobs pay"
        short[job.job_id] = terms
    return None


def _pick_by_ask(state: State, groups: list[WorkerGroup], task: Task, job: Job) -> tuple[PartyId | None, int | None]:
    """The cheapest free worker within the job's limit, the least loaded among equals, and the next one's ask.

    Own workers, which ask nothing, come first. A worker on which the task failed gets it again only when no other
    would take it.
    """
    entries = [
        (ask_of(job, worker), not is_own(job, worker), worker.load, worker.worker_id)
        for group in groups
        for worker in (state.workers[worker_id] for worker_id in group.members)
        if worker.window and is_affordable(job, worker)
    ]
    willing = [entry for entry in entries if entry[3] not in task.avoid] or entries
    free = sorted(entry for entry in willing if state.workers[entry[3]].free)
    if not free:
        return None, None
    return free[0][3], free[1][0] if len(free) > 1 else None


def _inspections(state: State, lane: Lane, now_ms: int) -> list[TaskId]:
    """Inspections that may begin, those of the account that was served longest ago first.

    Whoever registers many slow programs waits behind everybody else, each time anew.
    """
    due = [(number, task_id) for not_before_ms, number, task_id in lane.waiting if not_before_ms <= now_ms]

    def turn(entry: tuple[int, TaskId]) -> tuple[int, int]:
        number, task_id = entry
        return state.accounts[submitter_of(state, state.tasks[task_id])].inspected_last, number

    return [task_id for _, task_id in sorted(due, key=turn)]


def _pick(state: State, groups: list[WorkerGroup], task: Task) -> PartyId | None:
    """The least loaded free worker, the least trusted group first.

    A worker on which the task failed gets it again only when no other takes work.
    """
    best: tuple[int, PartyId] | None = None
    for group in groups:
        for entry in group.free:
            if entry[1] not in task.avoid:
                if best is None or entry[0] < best[0]:
                    best = entry
                break
    if best is not None:
        return best[1]
    others = (worker_id for group in groups for worker_id in group.members if worker_id not in task.avoid)
    if any(state.workers[worker_id].window for worker_id in others):
        return None
    return next((group.free[0][1] for group in groups if group.free), None)


def _grant(state: State, task: Task, worker: Worker, terms: Terms, now_ms: int, names: Names) -> tuple[e.Event, ...]:
    assert worker.session_id is not None, "free workers are connected"
    runtime_max_ms = runtime_limit_ms(task)
    granted = e.LeaseGranted(
        lease_id=LeaseId(names.new("lease")),
        task_id=task.task_id,
        worker_id=worker.worker_id,
        session_id=worker.session_id,
        fence=task.fence + 1,
        deadline_ms=now_ms + runtime_max_ms + _queue_ms(worker) + _transfer_ms(task),
        runtime_max_ms=runtime_max_ms,
        price_microcredits_per_unit=terms.price_microcredits_per_unit,
        reserved_microcredits=terms.reserved_microcredits,
    )
    if task.job_id is not None and state.jobs[task.job_id].state is JobState.QUEUED:
        running = e.JobStateChanged(job_id=task.job_id, state=JobState.RUNNING, reason="", reason_code="")
        return (granted, running)
    return (granted,)


def runtime_limit_ms(task: Task) -> int:
    """How long a task may run: generous, because a reference core is not the worker's."""
    if task.kind is TaskKind.INSPECT:
        return INSPECTION_RUNTIME_MS
    return min(RUNTIME_MS_MAX, max(RUNTIME_MS_MIN, RUNTIME_FACTOR * task.unit_micros * 1_000 // UNIT_MICROS))


def _queue_ms(worker: Worker) -> int:
    """How long the leases that it holds already may take before this one's turn comes."""
    rounds = len(worker.leases) // worker.slots
    held_ms = RUNTIME_FACTOR * worker.unit_micros_held * 1_000 // UNIT_MICROS // worker.slots
    return min(RUNTIME_MS_MAX, max(held_ms, rounds * RUNTIME_MS_MIN))


def _transfer_ms(task: Task) -> int:
    """Time for its input and an output of about that size on a slow link."""
    length_bytes = task.input.length_bytes if task.input is not None else 0
    return 2 * length_bytes // TRANSFER_BYTES_PER_MS_MIN


def _cut(state: State, job: Job, leases: int, names: Names) -> tuple[e.Event, ...]:
    bundle = state.bundles[job.bundle_digest]
    report = bundle.report
    assert report is not None, "a job is queued when its bundle is inspected"
    layout = Layout(job.row_starts, job.byte_starts)
    cost = Cost(report.unit_micros_per_row, report.unit_micros_per_kib)
    rows = cut_size(
        layout,
        cost,
        start=job.next_row,
        batch_rows=max(1, report.canonical_batch_rows),
        leases=max(1, leases),
        output_row_bytes=bundle.output_row_bytes,
    )
    end = job.next_row + rows
    task_id = TaskId(names.new("task"))
    created = e.TaskCreated(
        task_id=task_id,
        kind=TaskKind.MAP,
        job_id=job.job_id,
        bundle_digest=job.bundle_digest,
        pool_id=job.pool_id,
        spans=((job.next_row, end),),
        unit_micros=min(TASK_UNIT_MICROS_MAX, unit_micros(layout, cost, job.next_row, end)),
    )
    return (created, e.PackRequested(task_id=task_id, pack_number=1))
