"""What checks have found: verdicts, and what follows from them for rows, pay and workers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from fallow.comparison import CandidateFinding, Finding
from fallow.ids import JobId, LeaseId, PartyId
from fallow.job import JobState
from fallow.ranges import RangeSet
from fallow.session import Cause, TaskKind
from fallow_coordinator.core import commands as c
from fallow_coordinator.core import events as e
from fallow_coordinator.core import verification_events as v
from fallow_coordinator.core.answers import Decision
from fallow_coordinator.core.draft import Draft, shortened
from fallow_coordinator.core.evidence import Disputed, Evidence, Stand, Verification
from fallow_coordinator.core.limits import (
    REDONE_MAX,
    TIES_MAX,
)
from fallow_coordinator.core.state import Lease, State, Task
from fallow_coordinator.core.tolerances import Sample, learned
from fallow_coordinator.core.verification_events import EvidenceRow, Verdict
from fallow_coordinator.core.verifying import audits_released

_STANDING = frozenset({Finding.EQUAL, Finding.WITHIN_TOLERANCE})


# ------------------------------------------------------------------------------------------------- what was found


def record_comparison(state: State, command: c.RecordComparison) -> Decision:
    """Rows of an audit are equal to those that they check, or in dispute. A second answer changes nothing."""
    verification = state.verifications.get(command.job_id)
    audit = verification.audits.get(command.task_id) if verification is not None else None
    if audit is None or audit.compared or audit.lease_id is None or audit.worker_id is None:
        return Decision()
    assert len(command.equal) == len(audit.checks), "each row is compared"
    compared = v.AuditCompared(
        task_id=command.task_id,
        lease_id=audit.lease_id,
        job_id=command.job_id,
        worker_id=audit.worker_id,
        equal=command.equal,
    )
    return Decision((compared,))


def comparison_failed(state: State, command: c.ComparisonFailed) -> Decision:
    """The audit says nothing; a referee looks at its rows."""
    verification = state.verifications.get(command.job_id)
    audit = verification.audits.get(command.task_id) if verification is not None else None
    if verification is None or audit is None or audit.compared or audit.lease_id is None:
        return Decision()
    rows = tuple(row for row in audit.checks if verification.checked_by(row, audit.task_id) is not None)
    reason = shortened(f"its rows could not be compared: {command.reason}")
    released = tuple(audits_released(state, verification, (audit.task_id,)))
    return Decision((v.AuditGivenUp(job_id=command.job_id, rows=rows, reason=reason), *released))


def fault_of_findings(state: State, task: Task, command: c.ReportReferee) -> str:
    """What is wrong with a referee's report, or nothing."""
    assert task.job_id is not None, "referees decide about jobs' rows"
    verification = state.verifications[task.job_id]
    if [found.row for found in command.findings] != list(range(task.rows)):
        return f"the report has {len(command.findings)} rows, the task has {task.rows}"
    for found, row in zip(command.findings, task.checks, strict=True):
        needed = verification.checked_by(row, task.task_id) is not None
        if needed and (not found.candidates or found.candidates[0].finding is None):
            return f"the report says nothing of row {found.row}"
    return ""


@dataclass(slots=True)
class _Guilt:
    """Why somebody is proven wrong."""

    verdict: Verdict
    lease_id: LeaseId
    row: int


@dataclass(slots=True)
class _Outcome:
    """What a referee's report adds up to."""

    verdicts: list[v.VerdictReached] = field(default_factory=list[v.VerdictReached])
    guilty: dict[PartyId, _Guilt] = field(default_factory=dict[PartyId, _Guilt])
    upheld: set[EvidenceRow] = field(default_factory=set[EvidenceRow])
    again: dict[EvidenceRow, bool] = field(default_factory=dict[EvidenceRow, bool])
    """Rows to be done again without guilt; whether each had no value."""


def refereed(state: State, draft: Draft, task: Task, lease: Lease, command: c.ReportReferee) -> None:
    """The verdicts of a report and what follows from them."""
    assert task.job_id is not None, "referees decide about jobs' rows"
    job, verification = state.jobs[task.job_id], state.verifications[task.job_id]
    draft.events.append(
        v.RefereeReported(
            task_id=task.task_id,
            lease_id=lease.lease_id,
            job_id=job.job_id,
            worker_id=lease.worker_id,
            own_root=command.own_root,
            execution_class=command.execution_class,
            findings=command.findings,
            message_digest=command.message_digest,
            signature=command.signature,
            sequence=command.sequence,
        )
    )
    samples = _samples(state, verification, task, command)
    draft.events += learned(task.bundle_digest, command.execution_class, samples)
    outcome = _outcome(verification, task, lease.lease_id, command)
    draft.events += outcome.verdicts
    withdrawn = False
    for worker_id, guilt in outcome.guilty.items():
        withdrawn |= _annul(state, draft, verification, worker_id, guilt, outcome.upheld)
    for row, had_none in outcome.again.items():
        evidence = verification.evidences[row.lease_id]
        if evidence.worker_id not in outcome.guilty:
            withdrawn = True
            draft.events.append(_done_again(job.job_id, evidence, row.row, had_none=had_none))
    if withdrawn and job.state is JobState.VERIFYING:
        draft.events.append(e.JobStateChanged(job.job_id, JobState.RUNNING, "", ""))


def _samples(state: State, verification: Verification, task: Task, command: c.ReportReferee) -> Iterator[Sample]:
    """Rows that nobody's dispute brought before the referee: what they show of their classes may be learned."""
    for disputed, found in zip(verification.refereed[task.task_id], command.findings, strict=True):
        if disputed.differing is None and verification.checked_by(disputed.checks, task.task_id) is not None:
            evidence = verification.evidences[disputed.checks.lease_id]
            account_id = state.workers[evidence.worker_id].account_id
            yield Sample(account_id, evidence.execution_class, found.candidates[0])


def _outcome(verification: Verification, task: Task, lease_id: LeaseId, command: c.ReportReferee) -> _Outcome:
    made = _Outcome()
    for disputed, found in zip(verification.refereed[task.task_id], command.findings, strict=True):
        row = disputed.checks
        checked = verification.checked_by(row, task.task_id)
        if checked is not None:
            evidence = verification.evidences[row.lease_id]
            verdict = _verdict(verification, evidence, row.row, checked.ties, found.candidates[0], command)
            if verdict is not None:
                made.verdicts.append(
                    v.VerdictReached(
                        task.job_id or JobId(""), row.lease_id, row.row, evidence.worker_id, verdict, lease_id
                    )
                )
            if verdict is Verdict.PROVEN_WRONG or verdict is Verdict.UNEXPLAINED:
                known = made.guilty.get(evidence.worker_id)
                if known is None or known.verdict is Verdict.UNEXPLAINED:
                    made.guilty[evidence.worker_id] = _Guilt(verdict, row.lease_id, row.row)
            elif verdict is Verdict.DONE_AGAIN:
                made.again[row] = found.candidates[0].finding is Finding.WITHHELD
            elif verdict is not None:
                made.upheld.add(row)
        _judge_auditor(verification, disputed, found.candidates, lease_id, made)
    return made


def _verdict(
    verification: Verification,
    evidence: Evidence,
    row: int,
    ties: int,
    found: CandidateFinding,
    command: c.ReportReferee,
) -> Verdict | None:
    """What a finding means for the row; None: the referee looks once more."""
    if found.finding in _STANDING:
        return Verdict.UPHELD
    if found.finding is Finding.WRONG:
        return Verdict.PROVEN_WRONG
    if found.finding is Finding.TIE:
        return Verdict.TIE if ties + 1 >= TIES_MAX else None
    if found.finding is Finding.UNEXPLAINED and evidence.execution_class != command.execution_class:
        # Else a class that nobody shares would cost a cheater no more than the rows that are drawn.
        return Verdict.UNEXPLAINED
    # Not steady, or withheld: nobody's guilt. What others could not do better either stands as it is.
    done = verification.redone.get(evidence.position_of(row), 0)
    return Verdict.DONE_AGAIN if done < REDONE_MAX else Verdict.TIE


def _judge_auditor(
    verification: Verification,
    disputed: Disputed,
    candidates: tuple[CandidateFinding, ...],
    lease_id: LeaseId,
    made: _Outcome,
) -> None:
    differing = disputed.differing
    if differing is None or len(candidates) < 2 or candidates[1].finding is not Finding.WRONG:
        return
    audit_id = verification.audit_of.get(differing.lease_id)
    audit = verification.audits[audit_id] if audit_id is not None else None
    if audit is None or audit.worker_id is None:
        return
    verdict = Verdict.AUDITOR_WRONG
    job_id = verification.job_id
    made.verdicts.append(
        v.VerdictReached(job_id, differing.lease_id, differing.row, audit.worker_id, verdict, lease_id)
    )
    made.guilty.setdefault(audit.worker_id, _Guilt(verdict, differing.lease_id, differing.row))


# ------------------------------------------------------------------------------------------------- what follows


def _annul(
    state: State,
    draft: Draft,
    verification: Verification,
    worker_id: PartyId,
    guilt: _Guilt,
    upheld: set[EvidenceRow],
) -> bool:
    """A proven lie: no record, no pay, no further work of verifying jobs; what was not checked is done again.

    A row that nothing explains: no pay and no further work of this job alone. Gives whether rows were withdrawn.
    """
    worker = state.workers[worker_id]
    strange = guilt.verdict is Verdict.UNEXPLAINED
    what = "its audit of a row" if guilt.verdict is Verdict.AUDITOR_WRONG else "a row"
    how = "lies further from a referee's than rounding explains" if strange else "is proven wrong"
    reason = f"{what} of job {verification.job_id} {how} (lease {guilt.lease_id}, row {guilt.row})"
    if not strange and not worker.distrusted_reason:
        draft.events.append(
            v.WorkerDistrusted(worker_id, verification.job_id, guilt.lease_id, guilt.row, shortened(reason))
        )
    share = verification.shares.get(worker_id)
    evidences = [verification.evidences[lease_id] for lease_id in share.leases] if share is not None else []
    audits = [audit for audit in verification.audits.values() if audit.worker_id == worker_id]
    voided = sum(evidence.microcredits for evidence in evidences) + sum(audit.microcredits for audit in audits)
    if voided:
        draft.events.append(v.PayVoided(verification.job_id, worker_id, worker.account_id, voided))
    withdrawn = False
    annulled = {evidence.lease_id for evidence in evidences}
    for task_id in (*verification.refereed, *verification.audits):
        task = state.tasks.get(task_id)
        if task is not None and task.lease_id is None and all(row.lease_id in annulled for row in task.checks):
            draft.events.append(e.TaskDropped(task_id=task_id))
    for evidence in evidences:
        corrected = _withdrawn(verification.job_id, evidence, guilt.verdict, reason, upheld)
        withdrawn |= bool(corrected.spans)
        draft.events.append(corrected)
    for lease_id in tuple(worker.leases):
        lease = state.leases[lease_id]
        task = state.tasks[lease.task_id]
        concerned = task.job_id == verification.job_id if strange else task.job_id in state.verifications
        if concerned and task.kind is TaskKind.MAP:
            draft.end_lease(lease, e.LeaseOutcome.REVOKED, Cause.PLATFORM, f"a row of its worker {how}")
    return withdrawn


def _withdrawn(
    job_id: JobId, evidence: Evidence, verdict: Verdict, reason: str, upheld: set[EvidenceRow]
) -> v.RowsCorrected:
    """Everything of an evidence that was not checked and does not stand."""
    keeps = evidence.rows_failed <= len(evidence.failed_rows)
    gone = {row for row, checked in evidence.checked.items() if checked.stand is Stand.WITHDRAWN}
    kept = gone | {
        row
        for row, checked in evidence.checked.items()
        if keeps and (checked.stand is Stand.PASSED or EvidenceRow(evidence.lease_id, row) in upheld)
    }
    rows = [row for row in range(evidence.rows) if row not in kept]
    # Failures beyond those that are listed are somewhere among all rows: then all of them are done again.
    failed = sum(row in evidence.failed_rows for row in rows) if keeps else evidence.rows_failed
    return v.RowsCorrected(
        job_id=job_id,
        lease_id=evidence.lease_id,
        cursor=evidence.cursor,
        spans=RangeSet.of_positions(evidence.position_of(row) for row in rows).ranges,
        rows_failed=failed,
        verdict=verdict,
        reason=shortened(reason),
    )


def _done_again(job_id: JobId, evidence: Evidence, row: int, *, had_none: bool) -> v.RowsCorrected:
    position = evidence.position_of(row)
    reason = "it has no value, and a referee found one" if had_none else "it differs from a referee's without a reason"
    return v.RowsCorrected(
        job_id=job_id,
        lease_id=evidence.lease_id,
        cursor=evidence.cursor,
        spans=((position, position + 1),),
        rows_failed=int(had_none),
        verdict=Verdict.DONE_AGAIN,
        reason=reason,
    )
