"""Which records of the journal concern which job: what a certificate of results is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

from fallow.ids import JobId
from fallow_coordinator.core import events as ev
from fallow_coordinator.core import verification_events as v
from fallow_coordinator.core.state import State


@dataclass(frozen=True, slots=True)
class JobRecord:
    """A record of a job; `session_id` is, of a commitment, the session that it was signed in."""

    job_id: JobId
    session_id: str | None = None


def job_of(state: State, event: ev.Event) -> JobRecord | None:
    """The job that an event which has not happened yet is evidence about, or None."""
    find = _FINDERS.get(type(event))
    return None if find is None else find(state, event)


class _Named(Protocol):
    @property
    def job_id(self) -> JobId: ...


def _named(_: State, event: _Named) -> JobRecord:
    return JobRecord(event.job_id)


def _created(_: State, event: ev.TaskCreated) -> JobRecord | None:
    return None if event.job_id is None else JobRecord(event.job_id)


def _of_task(
    state: State, event: ev.LeaseGranted | ev.TaskSettled | ev.LateLeaseSettled | ev.TaskAbandoned
) -> JobRecord | None:
    job_id = state.tasks[event.task_id].job_id
    return None if job_id is None else JobRecord(job_id)


def _committed(state: State, event: ev.CommitmentRecorded) -> JobRecord | None:
    lease = state.leases[event.lease_id]
    job_id = state.tasks[lease.task_id].job_id
    return None if job_id is None else JobRecord(job_id, lease.session_id)


# A table of functions has another event in each row, which no type can say.
_FINDERS: Final[dict[type, Callable[[State, Any], JobRecord | None]]] = {
    ev.JobSubmitted: _named,
    ev.JobStateChanged: _named,
    ev.JobFunded: _named,
    v.DrawSecretSet: _named,
    v.AuditsDrawn: _named,
    v.AuditCompared: _named,
    v.AuditGivenUp: _named,
    v.RefereeReported: _named,
    v.VerdictReached: _named,
    v.RowsCorrected: _named,
    v.EvidenceReleased: _named,
    v.PayVoided: _named,
    v.WorkerDistrusted: _named,
    v.AssuranceAccepted: _named,
    ev.TaskCreated: _created,
    ev.LeaseGranted: _of_task,
    ev.TaskSettled: _of_task,
    ev.LateLeaseSettled: _of_task,
    ev.TaskAbandoned: _of_task,
    ev.CommitmentRecorded: _committed,
}
