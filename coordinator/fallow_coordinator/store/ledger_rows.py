"""Rows of the views about credits: what each event posted, and who was paid what for which work."""

from __future__ import annotations

from fallow.credits import PoolMode, Purse
from fallow.ids import JobId
from fallow_coordinator.core import events as ev
from fallow_coordinator.core import verification_events as v
from fallow_coordinator.core.ledger import BookKind, Posting
from fallow_coordinator.core.prices import device_class
from fallow_coordinator.core.state import State

LedgerRow = tuple[object, ...]

_WHAT: dict[type, str] = {
    ev.CreditsGranted: "grant",
    ev.CreditsReleased: "released",
    ev.JobSubmitted: "budget",
    ev.JobFunded: "top up",
    ev.JobStateChanged: "returned",
    ev.LeaseGranted: "work",
    ev.LeaseEnded: "work",
    ev.TaskSettled: "work",
    ev.LateLeaseSettled: "work",
    ev.AllotmentSet: "allotment",
    ev.AllotmentRenewed: "allotment",
    v.EvidenceReleased: "verified",
    v.PayVoided: "forfeited",
}


def posting_rows(
    state: State, event: ev.Event, postings: tuple[Posting, ...], sequence: int, at_ms: int
) -> list[LedgerRow]:
    """What the event posts, contribution left out: `settlements` tells it. Asked before the event is folded."""
    if all(posting.book.purse is Purse.CONTRIBUTION for posting in postings):
        return []
    job_id, worker_id = _job_and_worker(state, event)
    note = event.note if isinstance(event, ev.CreditsGranted | ev.CreditsReleased) else ""
    return [
        (
            sequence,
            number,
            at_ms,
            _what(event, posting, postings),
            _book(posting),
            posting.book.purse.value,
            _account_of(state, event, posting),
            posting.book.pool_id,
            job_id,
            worker_id,
            note,
            posting.microcredits,
        )
        for number, posting in enumerate(postings)
        if posting.book.purse is not Purse.CONTRIBUTION
    ]


def settlement_row(
    state: State, event: ev.TaskSettled | ev.LateLeaseSettled, sequence: int, at_ms: int
) -> LedgerRow | None:
    """Who did a task of a job and what they got. Asked before the event is folded."""
    task, lease = state.tasks[event.task_id], state.leases[event.lease_id]
    if task.job_id is None:
        return None
    worker = state.workers[lease.worker_id]
    return (
        sequence,
        at_ms,
        task.pool_id,
        task.job_id,
        state.jobs[task.job_id].account_id,
        worker.account_id,
        worker.worker_id,
        device_class(worker.capability),
        event.rows,
        event.rows_failed,
        task.unit_micros * (event.rows - event.rows_failed) // event.rows,
        lease.price_microcredits_per_unit,
        event.microcredits,
        event.contribution_microcredits,
        lease.commitment.millijoules if lease.commitment is not None else 0,
    )


def _book(posting: Posting) -> str:
    """What a quota job's leases may use still counts as its account's allotment until it is used."""
    of_leases = posting.book.kind is BookKind.HELD and posting.book.purse is Purse.ALLOTMENT
    return BookKind.ALLOTMENT.value if of_leases else posting.book.kind.value


def _what(event: ev.Event, posting: Posting, postings: tuple[Posting, ...]) -> str:
    """Which line of a statement it belongs to."""
    if isinstance(event, ev.AllotmentSet | ev.AllotmentRenewed):
        lapses = postings[0].book.kind is BookKind.ALLOTMENT and posting in postings[:2]
        return "lapsed" if lapses else "allotment"
    return _WHAT[type(event)]


def _job_and_worker(state: State, event: ev.Event) -> tuple[str, str]:
    match event:
        case ev.JobSubmitted() | ev.JobFunded() | ev.JobStateChanged():
            return event.job_id, ""
        case v.EvidenceReleased() | v.PayVoided():
            return event.job_id, event.worker_id
        case ev.LeaseGranted():
            return state.tasks[event.task_id].job_id or "", ""
        case ev.LeaseEnded():
            return state.tasks[state.leases[event.lease_id].task_id].job_id or "", ""
        case ev.TaskSettled() | ev.LateLeaseSettled():
            job_id = state.tasks[event.task_id].job_id or ""
            lease = state.leases[event.lease_id]
            # A quota job's allotment is one line for each job: reservations know no worker by then.
            paid = not job_id or state.jobs[JobId(job_id)].mode is PoolMode.MARKET
            return job_id, lease.worker_id if paid else ""
        case _:
            return "", ""


def _account_of(state: State, event: ev.Event, posting: Posting) -> str:
    """Whose statement shows it; a job's money is its account's."""
    if posting.book.kind is not BookKind.HELD:
        return posting.book.owner
    if isinstance(event, ev.JobSubmitted):
        return event.account_id
    return state.jobs[JobId(posting.book.owner)].account_id
