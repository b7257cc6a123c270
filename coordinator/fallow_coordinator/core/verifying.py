"""Jobs whose results are verified: what happens next, when pay is released, and how they end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from fallow.errors import FallowError, Reason
from fallow.ids import TaskId
from fallow.job import JOB_STATES_FINAL, JobState
from fallow_coordinator.core import auditing
from fallow_coordinator.core import commands as c
from fallow_coordinator.core import events as e
from fallow_coordinator.core import verification_events as v
from fallow_coordinator.core.answers import Decision
from fallow_coordinator.core.draft import Draft
from fallow_coordinator.core.draws import topped_up
from fallow_coordinator.core.evidence import Evidence, Verification
from fallow_coordinator.core.funding import resumed
from fallow_coordinator.core.names import Names
from fallow_coordinator.core.state import Job, State


def next_step(state: State, now_ms: int, names: Names) -> tuple[e.Event, ...]:
    """The next thing that verifying jobs need: a release, a task that checks or does rows again, or the job's end."""
    for job_id, verification in state.verifications.items():
        job = state.jobs[job_id]
        made = _released(state, verification)
        if not made and not job.parked:
            made = (
                auditing.redo(state, job, verification, names)
                or auditing.audit(state, job, verification, now_ms, names)
                or auditing.referee(state, job, verification, names)
                or _concluded(state, job, verification)
            )
        if made:
            return made
    return ()


def _released(state: State, verification: Verification) -> tuple[e.Event, ...]:
    """Pay of evidences of which enough was checked, and of audits that are in no dispute."""
    if not verification.releasable and not verification.audits_done:
        return ()
    evidences = (verification.evidences[lease_id] for lease_id in verification.releasable)
    return (
        *(_release_of(state, verification, evidence) for evidence in evidences),
        *audits_released(state, verification, verification.audits_done),
    )


def _release_of(
    state: State, verification: Verification, evidence: Evidence, *, accepted: bool = False
) -> v.EvidenceReleased:
    return v.EvidenceReleased(
        lease_id=evidence.lease_id,
        job_id=verification.job_id,
        worker_id=evidence.worker_id,
        account_id=state.workers[evidence.worker_id].account_id,
        microcredits=evidence.microcredits,
        accepted=accepted,
    )


def audits_released(
    state: State, verification: Verification, task_ids: Iterable[TaskId]
) -> Iterator[v.EvidenceReleased]:
    """Ends audits that have settled."""
    for task_id in task_ids:
        audit = verification.audits[task_id]
        if audit.lease_id is not None and audit.worker_id is not None:
            yield v.EvidenceReleased(
                lease_id=audit.lease_id,
                job_id=verification.job_id,
                worker_id=audit.worker_id,
                account_id=state.workers[audit.worker_id].account_id,
                microcredits=audit.microcredits,
            )


def _concluded(state: State, job: Job, verification: Verification) -> tuple[e.Event, ...]:
    """Once all rows are there and all that was drawn is decided: further draws, or the end."""
    if job.state is not JobState.VERIFYING or verification.open_rows or len(job.done) < job.rows:
        return ()
    return topped_up(state, job, verification) or _ended(state, job, verification, accepted=False)


def _ended(state: State, job: Job, verification: Verification, *, accepted: bool) -> tuple[e.Event, ...]:
    draft = Draft(state)
    draft.events += [
        _release_of(state, verification, evidence, accepted=accepted) for evidence in verification.evidences.values()
    ]
    draft.events += audits_released(state, verification, verification.audits)
    draft.conclude(job)
    return tuple(draft.events)


# ------------------------------------------------------------------------------------------------- people


def accept_assurance(state: State, command: c.AcceptAssurance) -> Decision:
    """The job succeeds with the checks made by now. Once it has ended nothing happens.

    Raises JOB_UNKNOWN, JOB_UNFINISHED while rows are missing, FIELD_INVALID for a job without an assurance.
    """
    job = state.jobs.get(command.job_id)
    if job is None or job.account_id != command.account_id:
        raise FallowError(Reason.JOB_UNKNOWN, f"this account has no job {command.job_id}", field="job_id")
    if job.state in JOB_STATES_FINAL:
        return Decision()
    verification = state.verifications.get(job.job_id)
    if verification is None:
        raise FallowError(
            Reason.FIELD_INVALID,
            "the job was submitted without an assurance",
            field="job_id",
            limit="a job in state verifying",
        )
    if len(job.done) < job.rows:
        raise FallowError(
            Reason.JOB_UNFINISHED,
            f"the job is {job.state.value}: {job.rows - len(job.done)} of {job.rows} rows are not there yet",
            field="job_id",
            limit="a job in state verifying",
        )
    # One that cannot pay for its checks need not wait for a top-up.
    goes_on = (resumed(job),) if job.state is JobState.PAUSED else ()
    accepted = v.AssuranceAccepted(job.job_id)
    return Decision((*goes_on, accepted, *_ended(state, job, verification, accepted=True)))
