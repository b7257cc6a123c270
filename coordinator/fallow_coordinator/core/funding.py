"""Whether a job can pay for a lease, what its worker is paid when it settles, and when a job without funds goes on."""

from __future__ import annotations

from dataclasses import dataclass

from fallow.credits import PoolMode, Purse, credits_text
from fallow.ids import AccountId, JobId, PoolId
from fallow.job import JobState
from fallow.roles import Tier
from fallow.session import TaskKind
from fallow_coordinator.core.events import JobStateChanged
from fallow_coordinator.core.ledger import allotment, held, treasury
from fallow_coordinator.core.limits import TREASURY_MICROCREDITS_MAX
from fallow_coordinator.core.prices import QUOTA_MICROCREDITS_PER_UNIT, pay, price_paid, reservation
from fallow_coordinator.core.state import Job, Lease, State, Task, Worker

BUDGET_EXHAUSTED = "BUDGET_EXHAUSTED"
ALLOTMENT_EXHAUSTED = "ALLOTMENT_EXHAUSTED"
_RELEASED_AT_ONCE = frozenset({Tier.MANAGED, Tier.OPERATOR})
"""Volunteers' pay waits for checks, or in jobs without an assurance for the operator's word; so does that of managed
workers in verifying jobs."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What a lease costs."""

    price_microcredits_per_unit: int = 0
    reserved_microcredits: int = 0


FREE = Terms()


@dataclass(frozen=True, slots=True)
class Shortage:
    """Why a job cannot pay for a lease."""

    code: str
    reason: str


@dataclass(frozen=True, slots=True)
class Settlement:
    """What a settled lease's worker gets."""

    microcredits: int = 0
    released: bool = False
    contribution_microcredits: int = 0


def is_own(job: Job, worker: Worker) -> bool:
    """Whether the worker belongs to who submitted the job: such work is free and outside the market."""
    return job.account_id == worker.account_id


def ask_of(job: Job, worker: Worker) -> int:
    """What the worker asks of this job for a unit."""
    return 0 if is_own(job, worker) else worker.capability.ask_microcredits_per_unit


def lease_terms(state: State, task: Task, worker: Worker, runner_up_ask: int | None) -> Terms | Shortage:
    """What the task costs on this worker, or why its job can't pay for it now.

    `runner_up_ask` is the cheapest ask of a feasible, free worker that does not get it, if there is one.
    """
    job = state.jobs[task.job_id] if task.job_id is not None else None
    if job is None or job.mode is PoolMode.DONATION or task.kind is TaskKind.REFEREE or is_own(job, worker):
        # NOTE: referees work for nothing: they are the operator's own, who could price them in his treasury.
        return FREE
    if job.mode is PoolMode.QUOTA:
        price = QUOTA_MICROCREDITS_PER_UNIT
    else:
        price = price_paid(
            ask=ask_of(job, worker), runner_up_ask=runner_up_ask, limit=job.options.limit_microcredits_per_unit
        )
    reserved = reservation(price, task.unit_micros)
    shortage = _shortage(state, job, reserved)
    return shortage or Terms(price, reserved)


def _shortage(state: State, job: Job, reserved: int) -> Shortage | None:
    if job.mode is PoolMode.QUOTA:
        free = state.ledger.balance(allotment(job.pool_id, job.account_id))
        if reserved > free:
            pool = state.pools[job.pool_id].name
            known = state.ledger.allotments.get((job.pool_id, job.account_id))
            enough = known is not None and known.microcredits >= reserved
            then = "it goes on with the next period" if enough else "no period gives so much: ask the operator for more"
            return Shortage(
                ALLOTMENT_EXHAUSTED,
                f"the account's allotment in pool {pool} has {credits_text(free)} units left, the next lease takes up "
                f"to {credits_text(reserved)}; {then}",
            )
        if not job.budget_microcredits:
            return None
    free = unreserved(state, job)
    if reserved <= free:
        return None
    return Shortage(
        BUDGET_EXHAUSTED,
        f"its budget of {credits_text(job.budget_microcredits)} credits has {credits_text(free)} left, the next lease "
        f"costs up to {credits_text(reserved)}: add some with `fallow job topup {job.job_id} CREDITS`",
    )


def unreserved(state: State, job: Job) -> int:
    """What the job may still promise to leases."""
    if job.mode is PoolMode.QUOTA:
        return max(0, job.budget_microcredits - job.microcredits - job.reserved_microcredits)
    return state.ledger.balance(held(job.job_id, Purse.CREDITS)) - job.reserved_microcredits


def paused(job_id: JobId, shortage: Shortage) -> JobStateChanged:
    """The pause of a job that can't pay; what it has under way goes on and is paid.

    At once, because its packed tasks would hold up those of others until its last lease ends.
    """
    return JobStateChanged(job_id, JobState.PAUSED, shortage.reason, shortage.code)


def is_short(job: Job) -> bool:
    """Whether it is paused because it could not pay."""
    return job.state is JobState.PAUSED and job.reason_code in (BUDGET_EXHAUSTED, ALLOTMENT_EXHAUSTED)


def resumed(job: Job) -> JobStateChanged:
    """The job goes on where it stood."""
    if len(job.done) == job.rows:
        return JobStateChanged(job.job_id, JobState.VERIFYING, "", "")
    begun = job.results or job.rows_leased
    return JobStateChanged(job.job_id, JobState.RUNNING if begun else JobState.QUEUED, "", "")


def short_of_allotment(state: State, pool_id: PoolId, account_id: AccountId) -> list[Job]:
    """Jobs that wait for this allotment."""
    return [
        job
        for job in state.jobs.values()
        if job.state is JobState.PAUSED
        and job.reason_code == ALLOTMENT_EXHAUSTED
        and job.pool_id == pool_id
        and job.account_id == account_id
    ]


def settlement(state: State, task: Task, lease: Lease, *, rows_failed: int) -> Settlement:
    """What the lease's worker gets for the rows done: pay where somebody pays, else its contribution is recorded."""
    if task.job_id is None or task.kind is TaskKind.REFEREE:
        return Settlement()
    job, worker = state.jobs[task.job_id], state.workers[lease.worker_id]
    if is_own(job, worker):
        return Settlement()
    paid = pay(lease.reserved_microcredits, rows=task.rows, rows_failed=rows_failed)
    if job.mode is PoolMode.MARKET:
        waits = job.job_id in state.verifications and worker.tier is not Tier.OPERATOR
        return Settlement(paid, released=worker.tier in _RELEASED_AT_ONCE and not waits)
    room = TREASURY_MICROCREDITS_MAX + state.ledger.balance(treasury(Purse.CONTRIBUTION))
    return Settlement(
        paid, contribution_microcredits=min(room, pay(task.unit_micros, rows=task.rows, rows_failed=rows_failed))
    )
