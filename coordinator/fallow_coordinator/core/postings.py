"""What each event moves between the books: a function of the event and the state just before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fallow.credits import PoolMode, Purse
from fallow.job import JOB_STATES_FINAL
from fallow_coordinator.core import events as e
from fallow_coordinator.core import verification_events as v
from fallow_coordinator.core.ledger import (
    Posting,
    allotment,
    available,
    contribution,
    held,
    pending,
    sink,
    transfer,
    treasury,
)
from fallow_coordinator.core.state import Job, State

_NOTHING: tuple[Posting, ...] = ()


def postings_of(state: State, event: e.Event) -> tuple[Posting, ...]:
    """The event's postings, which sum to zero; asked before `evolve` applies it."""
    found = _POSTINGS.get(type(event))
    return found(state, event) if found is not None else _NOTHING


def purse_of(job: Job) -> Purse:
    """What the job pays with."""
    return Purse.ALLOTMENT if job.mode is PoolMode.QUOTA else Purse.CREDITS


def _submitted(state: State, event: e.JobSubmitted) -> tuple[Posting, ...]:
    if not event.held_microcredits:
        return _NOTHING
    return transfer(available(event.account_id), held(event.job_id, Purse.CREDITS), event.held_microcredits)


def _granted_lease(state: State, event: e.LeaseGranted) -> tuple[Posting, ...]:
    """A quota job draws on its account's allotment lease by lease; a market job holds its budget from the start."""
    if not event.reserved_microcredits:
        return _NOTHING
    job_id = state.tasks[event.task_id].job_id
    assert job_id is not None, "only jobs pay"
    job = state.jobs[job_id]
    if job.mode is not PoolMode.QUOTA:
        return _NOTHING
    source = allotment(job.pool_id, job.account_id)
    return transfer(source, held(job_id, Purse.ALLOTMENT), event.reserved_microcredits)


def _ended_lease(state: State, event: e.LeaseEnded) -> tuple[Posting, ...]:
    lease = state.leases[event.lease_id]
    if not lease.reserved_microcredits:
        return _NOTHING
    job_id = state.tasks[lease.task_id].job_id
    assert job_id is not None, "only jobs pay"
    job = state.jobs[job_id]
    if job.mode is PoolMode.QUOTA:
        target = allotment(job.pool_id, job.account_id)
        return transfer(held(job_id, Purse.ALLOTMENT), target, lease.reserved_microcredits)
    return _left_over(job, lease.reserved_microcredits)


def _left_over(job: Job, microcredits: int) -> tuple[Posting, ...]:
    """What a late lease of a job that has ended leaves of its reservation: nobody else can use it any more."""
    if job.mode is not PoolMode.MARKET or job.state not in JOB_STATES_FINAL:
        return _NOTHING
    return transfer(held(job.job_id, Purse.CREDITS), available(job.account_id), microcredits)


def _settled(state: State, event: e.TaskSettled | e.LateLeaseSettled) -> tuple[Posting, ...]:
    lease = state.leases[event.lease_id]
    worker_account = state.workers[lease.worker_id].account_id
    made = transfer(treasury(Purse.CONTRIBUTION), contribution(worker_account), event.contribution_microcredits)
    job_id = state.tasks[event.task_id].job_id
    if job_id is None or not (event.microcredits or lease.reserved_microcredits):
        return made
    job = state.jobs[job_id]
    if job.mode is PoolMode.QUOTA:
        source = held(job_id, Purse.ALLOTMENT)
        rest = lease.reserved_microcredits - event.microcredits
        return (
            *made,
            *transfer(source, sink(Purse.ALLOTMENT), event.microcredits),
            *transfer(source, allotment(job.pool_id, job.account_id), rest),
        )
    target = available(worker_account) if event.released else pending(worker_account)
    return (
        *made,
        *transfer(held(job_id, Purse.CREDITS), target, event.microcredits),
        *_left_over(job, lease.reserved_microcredits - event.microcredits),
    )


def _moved_job(state: State, event: e.JobStateChanged) -> tuple[Posting, ...]:
    """The end of a job gives back what it holds, but for what leases that are still out may cost."""
    if event.state not in JOB_STATES_FINAL:
        return _NOTHING
    job = state.jobs[event.job_id]
    book = held(event.job_id, Purse.CREDITS)
    promised = job.reserved_microcredits if job.mode is PoolMode.MARKET else 0
    return transfer(book, available(job.account_id), state.ledger.balance(book) - promised)


def _funded(state: State, event: e.JobFunded) -> tuple[Posting, ...]:
    job = state.jobs[event.job_id]
    if job.mode is not PoolMode.MARKET:
        return _NOTHING
    return transfer(available(job.account_id), held(event.job_id, Purse.CREDITS), event.microcredits)


def _allotted(state: State, event: e.AllotmentSet | e.AllotmentRenewed) -> tuple[Posting, ...]:
    book = allotment(event.pool_id, event.account_id)
    return (
        *transfer(book, sink(Purse.ALLOTMENT), event.lapsed_microcredits),
        *transfer(treasury(Purse.ALLOTMENT), book, event.granted_microcredits),
    )


def _granted(state: State, event: e.CreditsGranted) -> tuple[Posting, ...]:
    return transfer(treasury(Purse.CREDITS), available(event.account_id), event.microcredits)


def _released(state: State, event: e.CreditsReleased) -> tuple[Posting, ...]:
    return transfer(pending(event.account_id), available(event.account_id), event.microcredits)


def _verified(state: State, event: v.EvidenceReleased) -> tuple[Posting, ...]:
    return transfer(pending(event.account_id), available(event.account_id), event.microcredits)


def _voided(state: State, event: v.PayVoided) -> tuple[Posting, ...]:
    """What a lie forfeits returns to the job that would have paid for it."""
    return transfer(pending(event.account_id), held(event.job_id, Purse.CREDITS), event.microcredits)


# A table of functions has another event in each row, which no type can say.
_POSTINGS: dict[type, Callable[[State, Any], tuple[Posting, ...]]] = {
    e.JobSubmitted: _submitted,
    e.LeaseGranted: _granted_lease,
    e.LeaseEnded: _ended_lease,
    e.TaskSettled: _settled,
    e.LateLeaseSettled: _settled,
    e.JobStateChanged: _moved_job,
    e.JobFunded: _funded,
    e.AllotmentSet: _allotted,
    e.AllotmentRenewed: _allotted,
    e.CreditsGranted: _granted,
    e.CreditsReleased: _released,
    v.EvidenceReleased: _verified,
    v.PayVoided: _voided,
}
