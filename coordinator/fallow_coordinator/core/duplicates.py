"""Which late tasks are given out a second time, and to whom (`docs/decisions/0020`).

At the end of a job, or when a lease runs far beyond what its worker's speed and the others' predict, a free worker that
would be done much sooner gets a second live lease of the same task. Whoever settles first delivers.
(Backup tasks: Dean and Ghemawat, 2004; by the longest time to the end: Zaharia et al., "LATE", OSDI 2008.)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice

from fallow.ids import AccountId, PartyId
from fallow.job import JobState, Objective
from fallow.session import TaskKind
from fallow_coordinator.core import events as e
from fallow_coordinator.core.deferral import work_left
from fallow_coordinator.core.funding import Shortage, Terms, is_own, lease_terms, unreserved
from fallow_coordinator.core.groups import numbers_in
from fallow_coordinator.core.limits import (
    DUPLICATES_LIVE_MAX,
    DUPLICATES_PER_JOB_MIN,
    DUPLICATES_PER_JOB_PERCENT,
    DUPLICATES_PER_TASK_MAX,
    FETCH_BYTES_PER_MS,
    LEASE_OVERHEAD_MS,
    STRAGGLER_FAR_FACTOR,
    STRAGGLER_FAR_MS_MIN,
    STRAGGLER_GAIN_FACTOR,
    STRAGGLERS_LOOKED_AT_MAX,
    TAKERS_LOOKED_AT_MAX,
)
from fallow_coordinator.core.matching import lease_granted
from fallow_coordinator.core.names import Names
from fallow_coordinator.core.prices import reservation
from fallow_coordinator.core.shares import share_key_after
from fallow_coordinator.core.speeds import expected_ms
from fallow_coordinator.core.state import Job, Lease, State, Task, TaskPhase, Worker


@dataclass(frozen=True, slots=True)
class Straggler:
    """A lease that is late, or will be."""

    task: Task
    lease: Lease
    left_ms: int
    """How long it is expected to last still."""
    far: bool
    """It ran so far beyond what was expected that it counts also while its job has other work to give out."""


def duplicates_due(state: State, now_ms: int, names: Names) -> list[e.LeaseGranted]:
    """Second leases of late tasks, to free workers that nothing else waits for; one for each account and each worker.

    Costs a look at no more than `STRAGGLERS_LOOKED_AT_MAX` leases, and at none while nobody is free.
    """
    room = DUPLICATES_LIVE_MAX - len(state.duplicated)
    found: list[e.LeaseGranted] = []
    served: set[AccountId] = set()
    taken: set[PartyId] = set()
    if room <= 0 or not state.free_groups & state.hungry_groups:
        return found
    for lease in islice(state.leases.values(), STRAGGLERS_LOOKED_AT_MAX):
        if now_ms - lease.granted_at_ms <= LEASE_OVERHEAD_MS or len(found) >= room:
            break
        task = state.tasks[lease.task_id]
        job = _job_that_doubles(state, task)
        if job is None or job.account_id in served or lease.commitment is not None:
            continue
        straggler = straggler_of(state, task, lease, now_ms)
        if not (straggler.far or is_near_its_end(job)):
            continue
        granted = _doubled(state, job, straggler, taken, now_ms, names)
        if granted is not None:
            served.add(job.account_id)
            taken.add(granted.worker_id)
            found.append(granted)
    return found


def _job_that_doubles(state: State, task: Task) -> Job | None:
    """The task's job, if this task of it may be given out once more."""
    if task.kind is not TaskKind.MAP or task.job_id is None or task.phase is not TaskPhase.LEASED:
        return None
    if task.duplicate_id is not None or task.duplicates >= DUPLICATES_PER_TASK_MAX:
        return None
    job = state.jobs[task.job_id]
    if job.job_id in state.verifications:
        # NOTE: what a late lease gives is no evidence yet, and rows that are checked anyway need none of it.
        return None
    # Doing work twice is not what somebody wants who asks for little carbon.
    willing = job.state is JobState.RUNNING and not job.parked and job.options.objective is not Objective.CARBON
    return job if willing and job.duplicates < duplicates_allowed(job) else None


def duplicates_allowed(job: Job) -> int:
    """How many duplicates the job may ever have."""
    return max(DUPLICATES_PER_JOB_MIN, job.tasks_created * DUPLICATES_PER_JOB_PERCENT // 100)


def is_near_its_end(job: Job) -> bool:
    """Whether all rows that are not done are in workers' hands: nothing else of the job could be given out."""
    return len(job.done) + job.rows_leased == job.rows


def straggler_of(state: State, task: Task, lease: Lease, now_ms: int) -> Straggler:
    """How late a lease is, by its worker's speed with the bundle, else by others'.

    One that is not there yet is expected at its time; one that is overdue is expected to take as long again as it is
    overdue.
    """
    worker = state.workers[lease.worker_id]
    place = next(index for index, lease_id in enumerate(worker.leases) if lease_id == lease.lease_id)
    begun_ms = lease.granted_at_ms
    if worker.slots == 1:
        # Its turn came when the one before was done, at the latest.
        begun_ms = max(begun_ms, worker.settled_at_ms)
    loads = task.bundle_digest not in worker.speeds
    expected = _expected_ms(state, worker, task, rounds=1 + place // worker.slots, loads=loads)
    elapsed = max(0, now_ms - begun_ms)
    far = elapsed >= max(STRAGGLER_FAR_MS_MIN, STRAGGLER_FAR_FACTOR * expected)
    return Straggler(task, lease, abs(expected - elapsed), far)


def _expected_ms(state: State, worker: Worker, task: Task, *, rounds: int, loads: bool) -> int:
    """From the lease to its end: a start, transfers, what comes before it on the same slot, the work itself."""
    length_bytes = task.input.length_bytes if task.input is not None else 0
    if loads:
        length_bytes += sum(file.length_bytes for file in state.bundles[task.bundle_digest].files)
    work_ms = expected_ms(state, worker, task.bundle_digest, task.unit_micros)
    return LEASE_OVERHEAD_MS + length_bytes // FETCH_BYTES_PER_MS + rounds * work_ms


def _doubled(
    state: State, job: Job, straggler: Straggler, taken: set[PartyId], now_ms: int, names: Names
) -> e.LeaseGranted | None:
    """The second lease, if somebody would be done much sooner and the job can pay for both."""
    task = straggler.task
    worker = _taker(state, job, straggler, taken)
    if worker is None:
        return None
    terms = lease_terms(state, task, worker, None)
    if isinstance(terms, Shortage) or not _can_spare(state, job, terms):
        return None
    account = state.accounts[job.account_id]
    granted = lease_granted(task, worker, terms, now_ms, names)
    return replace(granted, duplicate=True, share_key=share_key_after(account.share_key, task.unit_micros, now_ms))


def _can_spare(state: State, job: Job, terms: Terms) -> bool:
    """Whether enough is left for the rest of the job at this price: doing work twice shall not pause it."""
    if not terms.reserved_microcredits or is_near_its_end(job):
        return True
    rest = reservation(terms.price_microcredits_per_unit, work_left(state, job))
    return not job.budget_microcredits or unreserved(state, job) - terms.reserved_microcredits >= rest


def _taker(state: State, job: Job, straggler: Straggler, taken: set[PartyId]) -> Worker | None:
    """Who would be done first among free workers; of another account and on another machine where there is one."""
    task, lane = straggler.task, state.lanes[job.lane]
    holder = state.workers[straggler.lease.worker_id]
    best: tuple[bool, int, int, PartyId] | None = None
    for number in numbers_in(lane.groups & state.free_groups & state.hungry_groups):
        for _, ask, worker_id in state.groups[number].fastest[:TAKERS_LOOKED_AT_MAX]:
            worker = state.workers[worker_id]
            if worker_id == holder.worker_id or worker_id in task.avoid or worker_id in taken:
                continue
            if job.lane.paid and not is_own(job, worker) and ask > job.options.limit_microcredits_per_unit:
                continue
            took_ms = _expected_ms(
                state,
                worker,
                task,
                rounds=1 + len(worker.leases) // worker.slots,
                loads=task.bundle_digest not in worker.bundles,
            )
            if straggler.left_ms < STRAGGLER_GAIN_FACTOR * took_ms:
                continue
            rank = (_is_akin(worker, holder), took_ms, ask, worker_id)
            best = rank if best is None or rank < best else best
    return state.workers[best[3]] if best is not None else None


def _is_akin(worker: Worker, other: Worker) -> bool:
    """Whether two workers belong to one account or run on one machine: what they agree on says little."""
    same_machine = bool(worker.machine_digest) and worker.machine_digest == other.machine_digest
    return worker.account_id == other.account_id or same_machine
